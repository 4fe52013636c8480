"""Start programs that always end with this process, together with all their descendants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import IO

from trtqwen.system import guardian


@dataclass(frozen=True)
class Farewell:
    """Actions when this process ends without stopping the program.

    Attributes:
        signals: signals to send, with the seconds to wait after each; then the program is killed.
        remove: directories to remove.
        shared_memory: prefix of files in /dev/shm to remove; empty for none.
    """

    signals: tuple[tuple[Signals, float], ...] = ()
    remove: tuple[Path, ...] = ()
    shared_memory: str = ""


def python_environment() -> dict[str, str]:
    """Make the environment of a Python process that imports this trtqwen, and nothing from the working directory."""
    environment = dict(os.environ)
    package = os.fspath(Path(__file__).parents[2])
    rest = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{package}{os.pathsep}{rest}" if rest else package
    environment["PYTHONSAFEPATH"] = "1"  # Python 3.10 does not know it: its working directory must be a safe one
    return environment


def guardian_orders(
    command: Sequence[str], environment: Mapping[str, str], directory: Path, farewell: Farewell, niceness: int = 0
) -> str:
    """Return the first line for a guardian: the program, and the actions when it is abandoned."""
    orders = {
        "command": list(command),
        "environment": dict(environment),
        "directory": os.fspath(directory),
        "niceness": niceness,
        "orphaned": [(int(number), seconds) for number, seconds in farewell.signals],
        "remove": [os.fspath(path) for path in farewell.remove],
        "shared_memory": farewell.shared_memory,
    }
    return json.dumps(orders) + "\n"


def start_guarded(
    command: Sequence[str],
    environment: Mapping[str, str],
    directory: Path,
    *,
    output: int | IO[bytes],
    pass_fds: Sequence[int] = (),
    farewell: Farewell | None = None,
    niceness: int = 0,
) -> subprocess.Popen[str]:
    """Start a program under a guardian, in a session of its own whose id is the returned process's.

    The returned process is the guardian: it passes on signals, and its end is the program's end with the program's
    exit code. Keep the object: when it is collected, the program counts as abandoned.

    Args:
        environment: all of the program's environment.
        directory: where it runs.
        output: for its standard output and standard error.
        pass_fds: file descriptors that it inherits.
        niceness: how much other programs go before it where they want the same CPU; 0 to 19.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__],
        stdin=subprocess.PIPE,  # its end is the end of this process
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        pass_fds=pass_fds,
        start_new_session=True,  # Ctrl-C in the terminal is for us alone
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # its end says what happened
        process.stdin.write(guardian_orders(command, environment, directory, farewell or Farewell(), niceness))
        process.stdin.flush()
    return process

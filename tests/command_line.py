"""trtqwen on the command line: a process with its output and its exit code, as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.ranks import Nursery
from trtqwen.cli import COMMANDS

MODULES = tuple(f"trtqwen.cli.{name}" for name in COMMANDS)
_NURSERY = Nursery(*MODULES)  # ends with the process of the tests


def trtqwen(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. `text` is its standard input.

    For commands that end by themselves within seconds. Those that serve, or that tests kill, are started as users
    start them.
    """
    command = [sys.executable, "-m", "trtqwen", *map(str, arguments)]
    process = _NURSERY.Popen(command, env, cwd)
    with ThreadPoolExecutor(2) as readers, process.stdout, process.stderr:
        output, problem = readers.submit(process.stdout.read), readers.submit(process.stderr.read)
        with process.stdin as stdin:
            stdin.write(text)
        code = process.wait()
        return subprocess.CompletedProcess(command, code, output.result(), problem.result())

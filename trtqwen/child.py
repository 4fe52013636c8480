"""Runs a program that belongs to us: in a session of its own, its output passed on, ended when we end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def run_logged(
    command: Sequence[str], log: Path, on_line: Callable[[str], None], environment: Mapping[str, str]
) -> int:
    """Run a program to its end, its output and errors in `log`, each line also to `on_line`.

    Any exception, Ctrl-C among them, ends the program and all its children first. Call it from a thread that lives
    as long as the program: to Linux, the end of the starting thread is the end of the parent.

    Returns:
        its exit code, negative for a signal.

    Raises:
        OSError: if it cannot be started or the log cannot be written.
    """
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C in the terminal is for us alone
            preexec_fn=_die_with_parent(),
        )
        # Children that outlive the program, such as ranks whose parent the kernel killed, would hold its output open.
        reaper = threading.Thread(target=_reap, args=(process,), daemon=True)
        reaper.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                on_line(line.rstrip())
            reaper.join()
        except BaseException:
            _kill_group(process)
            reaper.join()
            raise
        return process.returncode


def _reap(process: subprocess.Popen[str]) -> None:
    process.wait()
    _kill_group(process)


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _die_with_parent() -> Callable[[], None]:
    # Looked up here: between fork and exec a child may not load libraries.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask

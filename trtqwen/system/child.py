"""Run a program in a session of its own, log its output, and end it when this process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trtqwen.system.processes import die_with_parent, kill_session


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
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        # Children that outlive the program, such as ranks whose parent the kernel killed, would hold its output open.
        reaper = threading.Thread(target=_reap, args=(process,), daemon=True)
        reaper.start()
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    on_line(line.rstrip())
            reaper.join()
        except BaseException:
            kill_session(process.pid)
            reaper.join()
            raise
        return process.returncode


def _reap(process: subprocess.Popen[str]) -> None:
    process.wait()
    kill_session(process.pid)

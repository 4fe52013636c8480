"""Processes for tests, forked from one that has imported what they need: imports are most of a short process.

Ranks are forked so in the tests of the executor alone; all others start them as users do, and so do the tests that
take the fixture `real_ranks`. Commands that only check, print and exit are forked by `tests/command_line.py`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

_MOST_BYTES = 1 << 17  # of a message: a rank's configuration, and the environment


class Nursery:
    """The process that others are forked from; starts with the first of them.

    Attributes:
        modules: what it imports.
    """

    PIPE = subprocess.PIPE

    def __init__(self, *modules: str) -> None:
        self.modules = modules
        self._process: subprocess.Popen[bytes] | None = None

    def Popen(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, **_: Any
    ) -> Forked:
        """Start `python -m` with a module that has a `main` as `subprocess.Popen` does with three pipes."""
        assert list(command[:2]) == [sys.executable, "-m"]
        if self._process is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                program = [sys.executable, "-m", "tests.ranks", *self.modules]
                self._process = subprocess.Popen(program, stdin=theirs.fileno(), cwd=Path(__file__).parents[1])
        pipes = [os.pipe() for _ in range(4)]  # standard input, output and error, and how the process ends
        ours = [pipes[0][1], *(pipe[0] for pipe in pipes[1:])]
        given = [pipes[0][0], *(pipe[1] for pipe in pipes[1:])]
        message = {
            "command": list(command[2:]),
            "env": dict(os.environ if env is None else env),
            "directory": str(cwd or Path.cwd()),
        }
        socket.send_fds(self._socket, [json.dumps(message).encode()], given)
        for end in given:
            os.close(end)
        return Forked(*ours)

    def stop(self) -> None:
        """End the process; what it has forked goes on."""
        if self._process is not None:
            self._socket.close()
            self._process.wait()


class Forked:
    """What an executor uses of a `subprocess.Popen`."""

    def __init__(self, stdin: int, stdout: int, stderr: int, end: int) -> None:
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout = os.fdopen(stdout, encoding="utf-8", errors="replace")
        self.stderr = os.fdopen(stderr, encoding="utf-8", errors="replace")
        self._end = os.fdopen(end, encoding="ascii")
        self._lock = threading.Lock()
        self.returncode: int | None = None
        self.pid = int(self._end.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        with self._lock:
            if self.returncode is None:
                self.returncode = int(self._end.readline())
                self._end.close()
            return self.returncode

    def kill(self) -> None:
        """Kill it if it still runs."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def main() -> None:
    """Fork a process for each message on the socket that is standard input, until it closes."""
    for module in sys.argv[1:]:
        import_module(module)
    requests = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes that watch are not waited for
    while True:
        message, given, _, _ = socket.recv_fds(requests, _MOST_BYTES, 4)
        if not message:
            return
        if not os.fork():
            requests.close()
            _watch(json.loads(message), given)
        for end in given:
            os.close(end)


def _watch(message: dict[str, Any], given: list[int]) -> NoReturn:
    """Be the parent of a process: tell its id and its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, end = given
    child = os.fork()
    if not child:
        os.close(end)
        _run(message, streams)
    for stream in streams:
        os.close(stream)
    os.write(end, b"%d\n" % child)
    os.write(end, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _run(message: dict[str, Any], streams: list[int]) -> NoReturn:
    code: object = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(message["env"])
        os.chdir(message["directory"])
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = output = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False))  # kept: a rank replaces it
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
        module = message["command"][0]
        sys.argv = message["command"]
        sys.modules["__main__"].__package__ = None  # usage lines name the module
        try:
            import_module("trtqwen.cli" if module == "trtqwen" else module).main()
            code = 0
        except SystemExit as ends:
            code = ends.code or 0
        output.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()

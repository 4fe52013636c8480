"""Processes for tests, forked from one that has imported what they need: imports are most of a short process.

Ranks are forked so in the tests of the executor alone, and what compiles guides for them, too; all others start them
as users do, and so do the tests that take the fixture `real_ranks`. Commands that only check, print and exit are
forked by `tests/command_line.py`, and gateways of one process by `quick_gateway` in `tests/gateway/conftest.py`.

Where several processes run the tests, `tests/conftest.py` starts one such process for all of them, and pytest-xdist's
workers are forked from it, too (`tests/forked_worker.py`).
"""

from __future__ import annotations

import fcntl
import gc
import io
import json
import os
import select
import selectors
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
from types import SimpleNamespace
from typing import IO, Any, NoReturn, cast

from trtqwen.system import guardian
from trtqwen.system.guarded import Farewell, guardian_orders

SHARED = "TRTQWEN_TEST_NURSERY"  # the address of the process that all processes of the tests fork from
_MOST_BYTES = 1 << 17  # of a message: a rank's configuration, and the environment


class Nursery:
    """The process that others are forked from: the shared one, or one that starts with the first of them.

    Attributes:
        modules: what it imports.
    """

    PIPE = subprocess.PIPE

    def __init__(self, *modules: str) -> None:
        self.modules = modules
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def Popen(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, **_: Any
    ) -> Forked:
        """Start `python -m` with a module that has a `main` as `subprocess.Popen` does with three pipes."""
        assert list(command[:2]) == [sys.executable, "-m"]
        pipes = [os.pipe() for _ in range(4)]  # standard input, output and error, and how the process ends
        ours = [pipes[0][1], *(pipe[0] for pipe in pipes[1:])]
        given = [pipes[0][0], *(pipe[1] for pipe in pipes[1:])]
        message = {
            "command": list(command[2:]),
            "env": dict(os.environ if env is None else env),
            "directory": str(cwd or Path.cwd()),
        }
        self._send(message, given)
        for end in given:
            os.close(end)
        return Forked(*ours)

    def start_silent(
        self, command: Sequence[str], *, pass_fds: Sequence[int], env: Mapping[str, str], cwd: str, **_: Any
    ) -> Child:
        """Start `python -m` as `trtqwen.system.forks` does, with this process's standard error."""
        assert list(command[:2]) == [sys.executable, "-m"]
        ours, theirs = os.pipe()
        nothing = os.open(os.devnull, os.O_RDWR)
        message = {"command": list(command[2:]), "env": dict(env), "directory": cwd, "numbers": list(pass_fds)}
        self._send(message, [nothing, nothing, 2, *pass_fds, theirs])
        os.close(nothing)
        os.close(theirs)
        return Child(ours)

    def start_guarded(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        directory: Path,
        *,
        output: int | IO[bytes],
        pass_fds: Sequence[int] = (),
        farewell: Farewell | None = None,
    ) -> Guarded:
        """Start `python -m` with a module that has a `main`, as `trtqwen.system.guarded.start_guarded` does."""
        assert (list(command[:2]), output) == ([sys.executable, "-m"], subprocess.PIPE)
        pipes = [os.pipe() for _ in range(3)]  # standard input, output, and how the process ends
        given = [pipes[0][0], pipes[1][1], *pass_fds, pipes[2][1]]
        self._send({"pass_fds": list(pass_fds)}, given)
        for end in (pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(end)
        process = Guarded(pipes[0][1], pipes[1][0], pipes[2][0])
        process.stdin.write(guardian_orders(command[2:], environment, directory, farewell or Farewell()))
        process.stdin.flush()
        return process

    def listen(self, address: Path) -> None:
        """Start the process, which forks for all that connect to a socket, until this process stops it or ends."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.fspath(address))
            listener.listen()
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = self._start(theirs, listener)

    def _send(self, message: dict[str, Any], given: Sequence[int]) -> None:
        if self._socket is None and SHARED in os.environ:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.connect(os.environ[SHARED])
        elif self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = self._start(theirs)
        socket.send_fds(self._socket, [json.dumps(message).encode()], given)

    def _start(self, *sockets: socket.socket) -> subprocess.Popen[bytes]:
        numbers = [end.fileno() for end in sockets]
        program = [sys.executable, "-m", "tests.ranks", ",".join(map(str, numbers)), *self.modules]
        return subprocess.Popen(program, pass_fds=numbers, stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[1])

    def stop(self) -> None:
        """End the process, if it is this one's; what it has forked goes on."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait()


class Child:
    """What a `subprocess.Popen` says of its process."""

    def __init__(self, end: int) -> None:
        self._end = os.fdopen(end, "rb", buffering=0)
        self._lock = threading.Lock()
        self.returncode: int | None = None
        self.pid = int(self._end.readline())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit code. Raises `subprocess.TimeoutExpired`."""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._end], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("a forked process", timeout or 0)
                self.returncode = int(self._end.readline())
                self._end.close()
            return self.returncode

    def kill(self) -> None:
        """Kill it if it still runs."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


class Forked(Child):
    """What an executor uses of a `subprocess.Popen`."""

    def __init__(self, stdin: int, stdout: int, stderr: int, end: int) -> None:
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout = os.fdopen(stdout, encoding="utf-8", errors="replace")
        self.stderr = os.fdopen(stderr, encoding="utf-8", errors="replace")
        super().__init__(end)


class Guarded(Child):
    """What `trtqwen.system.processes.Service` uses of the guardian's `subprocess.Popen`."""

    def __init__(self, stdin: int, stdout: int, end: int) -> None:
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.stdout = os.fdopen(stdout, encoding="utf-8", errors="replace")
        super().__init__(end)


def main() -> None:
    """Fork a process for each message on some sockets, until the first of them closes; the second accepts others."""
    for module in sys.argv[2:]:
        import_module(module)
    gc.freeze()  # a collection in a fork would write to all of them, and so copy their memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes that watch are not waited for
    first, *listeners = [socket.socket(fileno=int(number)) for number in sys.argv[1].split(",")]
    with selectors.DefaultSelector() as ready:
        for one in (first, *listeners):
            ready.register(one, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                asked = cast(socket.socket, key.fileobj)
                if asked in listeners:
                    ready.register(asked.accept()[0], selectors.EVENT_READ)
                    continue
                message, given, _, _ = socket.recv_fds(asked, _MOST_BYTES, 8)
                if message and not os.fork():
                    for other in list(ready.get_map().values()):
                        cast(socket.socket, other.fileobj).close()
                    ready.close()
                    _watch(json.loads(message), given)
                for end in given:
                    os.close(end)
                if message:
                    continue
                if asked is first:
                    return
                ready.unregister(asked)
                asked.close()


def _watch(message: dict[str, Any], given: list[int]) -> NoReturn:
    """Be the parent of a process: tell its id and its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, end = given
    child = os.fork()
    if not child:
        os.close(end)
        if "pass_fds" in message:
            _guard(message["pass_fds"], streams)
        _run(message, streams)
    for stream in streams:
        os.close(stream)
    with suppress(BrokenPipeError):  # who asked has ended
        os.write(end, b"%d\n" % child)
        os.write(end, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _run(message: dict[str, Any], streams: list[int]) -> NoReturn:
    code: object = 1
    try:
        passed = [fcntl.fcntl(stream, fcntl.F_DUPFD, 200) for stream in streams]
        for stream in streams:
            os.close(stream)
        for number, stream in zip((0, 1, 2, *message.get("numbers", ())), passed, strict=True):
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
        if module == "trtqwen.executor.worker" and SHARED in os.environ:
            started = SimpleNamespace(Popen=Nursery().start_silent, DEVNULL=subprocess.DEVNULL)
            vars(import_module("trtqwen.system.forks"))["subprocess"] = started
        try:
            import_module("trtqwen.cli" if module == "trtqwen" else module).main()
            code = 0
        except SystemExit as ends:
            code = ends.code or 0
        output.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code if isinstance(code, int) else 1)


def _guard(numbers: Sequence[int], given: Sequence[int]) -> NoReturn:
    """Be the guardian of a module's `main`, which runs in a fork.

    Args:
        numbers: of the file descriptors that the module inherits.
        given: standard input, standard output and error, and those descriptors.
    """
    code = 1
    try:
        os.setsid()
        source, target, *passed = [fcntl.fcntl(one, fcntl.F_DUPFD, 200) for one in given]
        for number, one in zip((0, 1, 2, *numbers), (source, target, target, *passed), strict=True):
            os.dup2(one, number)
        for one in (*given, source, target, *passed):
            if one not in (0, 1, 2, *numbers):
                os.close(one)
        guardian.start = _start
        guardian.main()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _start(spec: dict[str, Any], libc: Any) -> int:
    """Do as `guardian.start`, but for the new program."""
    program = os.fork()
    if program:
        return program
    code = 1
    try:
        libc.prctl(guardian.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (*guardian.FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(spec["directory"])
        os.environ.clear()
        os.environ.update(spec["environment"])
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
        sys.argv = spec["command"]
        code = import_module(f"{sys.argv[0]}.__main__").main()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    main()

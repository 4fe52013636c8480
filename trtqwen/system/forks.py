"""Run untrusted work in processes with limits, which are forked from a process with the imports.

`python -m MODULE FD ARGUMENTS` calls `serve_forks(FD, answer, ...)`. It ends when FD closes, a fork when its socket
does: both end with the process that asks.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from trtqwen.system.guarded import python_environment
from trtqwen.system.processes import stopped

_LENGTH = 4  # bytes in front of each message
_START_SECONDS = 60.0  # until the first process has its imports
_LOOK_SECONDS = 0.5
_TRIES = 2  # a process that was killed or stopped from outside is replaced once


class ForkServer:
    """Sends questions to forks of a process. Thread-safe: each question has a fork of its own.

    Args:
        module: of this package, whose `main` calls `serve_forks`.
        arguments: for it, behind the file descriptor.
        seconds: of CPU time after which a fork ends, as the module sets it.
    """

    def __init__(self, module: str, arguments: Sequence[str], seconds: float) -> None:
        self._module = module
        self._arguments = arguments
        self._seconds = seconds
        self._open()

    def _open(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[_Fork] = []
        self._start()

    def ask(self, question: bytes, patience: float) -> bytes | None:
        """The answer of a fork; None if it hits a limit.

        Args:
            patience: time limit in seconds.

        Raises:
            OSError: if there is no process to ask.
        """
        if self._owner != os.getpid():
            self._open()  # a forked process would share sockets, and answers, with the one that it is a copy of
        for _ in range(_TRIES):
            with self._lock:
                fork = self._idle.pop() if self._idle else self._fork()
            begun = time.monotonic()
            try:
                fork.socket.settimeout(_LOOK_SECONDS)
                _send(fork.socket, question)
                answer = _receive(fork, patience)
            except OSError:
                answer = None
            if answer is not None:
                with self._lock:
                    self._idle.append(fork)
                return answer
            fork.end()
            if time.monotonic() - begun >= min(patience, self._seconds):
                return None
            with self._lock:  # what killed or stopped this one has met the others too
                others, self._idle = self._idle, []
            for other in others:
                other.end()
        return None

    def _fork(self) -> _Fork:
        for _ in range(_TRIES):
            if self._parent.poll() is not None:
                self._start()
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
                ours.settimeout(_LOOK_SECONDS)
                identity = _receive(_Fork(ours, self._parent.pid), _START_SECONDS)
                if identity is not None:
                    return _Fork(ours, int.from_bytes(identity, "little"))
            except OSError:
                pass
            ours.close()
            self._parent.kill()  # it is stopped, or has just ended: the next one takes its place
            self._parent.wait()
        raise OSError(f"{self._module} does not run")

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # ours may be for events
                pass_fds=[theirs.fileno()],
                env=python_environment(),
                cwd="/",  # Python looks for modules in the working directory
            )


@dataclass(frozen=True)
class _Fork:
    """A process that answers at a socket."""

    socket: socket.socket
    pid: int

    def end(self) -> None:
        """End it, also if it is stopped."""
        self.socket.close()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def serve_forks(
    control: socket.socket, answer: Callable[[bytes], bytes], cpu_seconds: float, niceness: int = 0
) -> None:
    """Fork a process for every socket that comes, until the other end closes. Each answers question by question.

    Args:
        answer: must not raise. The process is killed when its CPU time is over.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that dead children vanish by themselves
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end, which closes `control`
    while True:
        _, sockets, *_ = socket.recv_fds(control, 16, 1)
        if not sockets:
            return
        with socket.socket(fileno=sockets[0]) as client:
            if os.fork() == 0:
                control.close()
                os.nice(niceness)
                _answer_all(client, answer, cpu_seconds)
                os._exit(0)


def _answer_all(client: socket.socket, answer: Callable[[bytes], bytes], cpu_seconds: float) -> None:
    with suppress(OSError):
        _send(client, os.getpid().to_bytes(_LENGTH, "little"))
        while (question := _read(client)) is not None:
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its signal kills, in any state of a library
            content = answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(client, content)


def _receive(fork: _Fork, seconds: float) -> bytes | None:
    """Receive from a process; None if it has ended, is stopped (SIGSTOP), or takes longer."""
    deadline = time.monotonic() + seconds
    fork.socket.settimeout(min(_LOOK_SECONDS, seconds))
    while time.monotonic() < deadline:
        try:
            return _read(fork.socket)
        except TimeoutError:
            if stopped(fork.pid):
                return None
    return None


def _send(target: socket.socket, content: bytes) -> None:
    target.sendall(len(content).to_bytes(_LENGTH, "little") + content)


def _read(source: socket.socket) -> bytes | None:
    """The next message; None at the end. A timeout may come before its first byte, and ends it afterwards."""
    head = source.recv(_LENGTH, socket.MSG_WAITALL)
    if len(head) < _LENGTH:
        return None
    content = bytearray(int.from_bytes(head, "little"))
    view = memoryview(content)
    while view:
        try:
            count = source.recv_into(view)
        except TimeoutError:
            return None
        if not count:
            return None
        view = view[count:]
    return bytes(content)

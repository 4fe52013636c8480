"""Child processes: they end with this process, and none is left."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import IO, TypeVar

from trtqwen.diagnostics import ServerError
from trtqwen.system.guardian import remove_files, shared_memory_of

S = TypeVar("S", bound="Service")

_PR_SET_PDEATHSIG = 1
_LINES_WAITING = 1000
_LAST_LINES = 2  # C++ says on the first that it terminates, on the second why
_USER_TICKS = 11  # those of the kernel follow
_STATE, _PARENT, _SESSION = 0, 1, 3  # fields of /proc/PID/stat, counted after the program's name


class Service(ABC):
    """A server in a process of its own; use as a context manager or call `start` and `stop`.

    Attributes:
        name: its name in messages.
        start_seconds: how long it may take until it serves. May grow while it starts.
        stop_seconds: how long `stop` lets running requests finish.
    """

    name: str = "the server"
    start_seconds: float = 300
    stop_seconds: float = 30

    @abstractmethod
    def start(self) -> None:
        """Start the process; `wait_until_ready` tells when it serves."""

    @abstractmethod
    def answers(self) -> bool:
        """Return whether it serves now."""

    @abstractmethod
    def check(self) -> None:
        """Raise a ServerError if it has ended by itself, or hangs."""

    @abstractmethod
    def stop(self, *, drain: bool = True) -> object:
        """End it, if it runs. May be called again.

        Args:
            drain: let running requests finish; otherwise each ends with an error.
        """

    @abstractmethod
    def kill(self) -> None:
        """Kill every process of it. A `stop` that waits in another frame or thread then returns."""

    def late(self) -> ServerError:
        """Return the error for a start that takes too long."""
        return ServerError(f"{self.name} was not ready within {self.start_seconds:g} s")

    def wait_until_ready(self, timeout: float | None = None, behind: Service | None = None) -> None:
        """Wait until it serves. Raises a ServerError as soon as it ends instead.

        Args:
            timeout: seconds; None is `start_seconds`.
            behind: another service that it needs.
        """
        begun = time.monotonic()
        while not self.answers():
            if behind is not None:
                behind.check()
            self.check()
            if time.monotonic() - begun > (self.start_seconds if timeout is None else timeout):
                raise self.late()
            time.sleep(0.05)

    def __enter__(self: S) -> S:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Relay:
    """Forwards a process's output by lines. Drops lines that are not read in time, so that the process never waits.

    Args:
        source: read end of the pipe.
        target: file descriptor to write to; our standard error by default.
        keep_back: prefix of lines that are not forwarded.
        remember: pattern whose first match in a line is kept, as its first group.

    Attributes:
        remembered: that match; None without one.
        last_lines: the last few that were not empty, without white space around.
    """

    def __init__(
        self,
        source: IO[str],
        target: int = 2,
        keep_back: str | None = None,
        remember: re.Pattern[str] | None = None,
    ) -> None:
        self.remembered: str | None = None
        self._remember = remember
        self.last_lines = deque[str](maxlen=_LAST_LINES)
        self._source, self._target, self._keep_back = source, target, keep_back
        self._lines: Queue[str | None] = Queue(_LINES_WAITING)
        self._threads = [Thread(target=work, daemon=True) for work in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def join(self, timeout: float = 1) -> None:
        """Wait until everything is forwarded, with a time limit for each end of the pipe."""
        for thread in self._threads:
            thread.join(timeout)

    def _read(self) -> None:
        with self._source:
            for line in self._source:
                if line.strip():
                    self.last_lines.append(line.strip())
                if self._remember is not None and self.remembered is None and (found := self._remember.search(line)):
                    self.remembered = found[1]
                if self._keep_back is None or not line.startswith(self._keep_back):
                    self._pass_on(line)
        self._pass_on(None)

    def _pass_on(self, line: str | None) -> None:
        with suppress(Full):
            self._lines.put_nowait(line)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError):
                os.write(self._target, line.encode())  # a lock of Python's would abort the interpreter's end


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """Request a signal at the end of the parent thread. A child calls it between fork and exec."""
    # Looked up here: between fork and exec a child may not load libraries.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def living(session: int) -> Iterator[int]:
    """Process ids of a session. MPI gives every rank a process group of its own, but they stay in its session.

    An ended process counts until init reaps it. An ended child of this process does not count.
    """
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = _stat(int(entry.name))
                ours = fields[_STATE] == "Z" and int(fields[_PARENT]) == os.getpid()
                if int(fields[_SESSION]) == session and not ours:
                    yield int(entry.name)


def programs(session: int, names: Collection[str]) -> dict[int, list[str]]:
    """The processes of a session that run one of the programs `names`: their commands, by process id."""
    found = {}
    for pid in living(session):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").split("\0")
            # A script's interpreter comes before it.
            if not {Path(word).name for word in words[:2]}.isdisjoint(names):
                found[pid] = words
    return found


def child(pid: int) -> int:
    """The first child of a process; waits for it for a second. The process itself if it has none."""
    for _ in range(100):
        for candidate in living(pid):
            with suppress(OSError):
                if int(_stat(candidate)[_PARENT]) == pid:
                    return candidate
        time.sleep(0.01)
    return pid


def runs(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        return _stat(pid)[_STATE] not in "ZX"
    except OSError:
        return False


def stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP."""
    try:
        return _stat(pid)[_STATE] in "Tt"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far; 0 if it has ended."""
    try:
        return sum(map(int, _stat(pid)[_USER_TICKS : _USER_TICKS + 2])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def busy_nanoseconds(pid: int) -> dict[int, int]:
    """Return how long each thread has computed or waited for a CPU; empty if the kernel does not report it."""
    found = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, ValueError):
                ran, waited, _ = (task / "schedstat").read_text().split()
                found[int(task.name)] = int(ran) + int(waited)
    return found


def runnable(pid: int) -> bool:
    """Whether a thread of a process computes or waits for a CPU, asked now."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                if _stat(int(task.name))[_STATE] == "R":
                    return True
    return False


def ending(code: int) -> str:
    """Describe how a process ended, as text after its name."""
    return f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _stat(pid: int) -> list[str]:
    """The fields of a process or a thread, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def kill_session(session: int) -> None:
    """Kill the processes that are left of a session, such as python stubs and ranks."""
    deadline = time.monotonic() + 5
    left: set[str] = set()
    while time.monotonic() < deadline:
        pids = list(living(session))
        if not pids:
            remove_files(left)
            return
        for pid in pids:
            left |= shared_memory_of(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def resident_bytes(pid: int) -> int:
    """Memory of a process and all its descendants, in bytes; shared pages count for each of them."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[_PARENT])
    family = {pid}
    found = {pid}
    while found:
        found = {child for child, parent in parents.items() if parent in family and child not in family}
        family |= found
    total = 0
    for member in family:
        with suppress(OSError, IndexError):
            total += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total

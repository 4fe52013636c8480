"""Files that must not change while they are read: truncation of a mapped file kills its reader."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trtqwen.diagnostics import SourceError

_F_SETSIG = 10  # fcntl(2); the module has no name for it
_State = tuple[int, int, int, int, int]


class SteadyFiles:
    """The state of some files at one moment, and a check that they are unchanged. Thread-safe.

    Args:
        paths: the files.

    Raises:
        SourceError: if one is missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._states = {path: _state(path) for path in paths}
        self._leases: dict[Path, int] = {}

    @property
    def leased(self) -> bool:
        """Whether the kernel makes writers of every file wait."""
        return self._leases.keys() == self._states.keys()

    def check(self) -> None:
        """Compare every file with the state it was in.

        Raises:
            SourceError: if another process has changed a file or, while they are held, is about to.
        """
        for path, descriptor in self._leases.items():
            if fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                raise _changed(path, "another process opens it for writing while it is read")
        for path, state in self._states.items():
            if _state(path) != state:
                raise _changed(path, "was changed while it was read")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Ask the kernel to make writers wait until the block ends, or until `check` has noticed them.

        A lease (fcntl(2)) blocks processes that open a file for writing or truncate it. Not every file system has
        leases, and only a file's owner gets one. Without leases (see `leased`), `check` still compares sizes and
        times.
        """
        with ExitStack() as stack:
            for path in self._states:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)  # which also gives the lease back
                try:
                    fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)  # ignored by default; `check` asks instead
                    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                except OSError:
                    continue
                self._leases[path] = descriptor
            stack.callback(self._leases.clear)
            self.check()
            yield


def _state(path: Path) -> _State:
    try:
        status = path.stat()
    except OSError as problem:
        raise SourceError(f"{path}: cannot be read ({problem.strerror})", "check that nothing removes it") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: Path, what: str) -> SourceError:
    return SourceError(f"{path}: {what}", "wait until the file is complete, and run the command again")

"""A file written in large blocks by a thread of its own."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import numpy.typing as npt
import xxhash

_BUFFER_BYTES = 4 << 20  # written at a time


class BlockFile:
    """A file written front to back in large aligned blocks, by a thread, past the page cache where that is possible.

    Data that is not read back soon would only displace the source model from the cache.
    """

    def __init__(self, path: Path) -> None:
        self.digest = xxhash.xxh3_128()
        self._descriptor, self._direct = _open_direct(path)
        self._problem: OSError | None = None
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()  # maps are aligned to pages, as direct writes ask
        self._full: SimpleQueue[tuple[mmap.mmap, int] | None] = SimpleQueue()
        for _ in range(2):
            self._free.put(mmap.mmap(-1, _BUFFER_BYTES))
        self._buffer, self._used = self._free.get(), 0
        self._thread = Thread(target=self._drain, daemon=True)
        self._thread.start()

    def append(self, data: npt.NDArray[np.uint8]) -> None:
        """Copy bytes into the buffer; raises the thread's OSError, if it had one."""
        while len(data):
            count = min(len(data), _BUFFER_BYTES - self._used)
            np.frombuffer(self._buffer, np.uint8, count, self._used)[:] = data[:count]
            self._used += count
            data = data[count:]
            if self._used == _BUFFER_BYTES:
                self._full.put((self._buffer, self._used))
                self._buffer, self._used = self._free.get(), 0
                if self._problem:
                    raise self._problem

    def close(self, *, sync: bool) -> None:
        """Write what is left and end the thread.

        Args:
            sync: wait until the file is on the disk; otherwise what it holds does not matter.
        """
        if sync:
            self._full.put((self._buffer, self._used))
        self._full.put(None)
        self._thread.join()
        try:
            if sync:
                if self._problem:
                    raise self._problem
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _drain(self) -> None:
        while (filled := self._full.get()) is not None:
            buffer, used = filled
            try:
                if self._problem is None:
                    self._write(memoryview(buffer)[:used])
            except OSError as problem:
                self._problem = problem
            self._free.put(buffer)

    def _write(self, view: memoryview) -> None:
        self.digest.update(view)
        if self._direct and len(view) % mmap.PAGESIZE:  # the end of the file
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, 0)
            self._direct = False
        while view:
            view = view[os.write(self._descriptor, view) :]


def _open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor of a new file, and whether its writes pass by the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o666), False  # a file system without direct writes, such as an older tmpfs

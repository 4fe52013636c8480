"""What a server keeps outside its directories: a temporary directory and files in /dev/shm.

Each carries a file that its owner keeps locked. The kernel drops the lock of a process that has ended, however it
ended, in this container or in another that shares the directory: whoever gets the lock may remove the rest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "trtqwen-"
_OWNER = "owner"  # ends the name of the locked file


@contextmanager
def workspace() -> Iterator[Path]:
    """A new temporary directory, readable by us alone, until the block ends."""
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    descriptor = _lock(directory / _OWNER)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _close(descriptor)


@contextmanager
def shared_memory(prefix: str) -> Iterator[None]:
    """Own every file in /dev/shm whose name begins with `prefix`, until the block ends."""
    descriptor = _lock(SHARED_MEMORY / f"{prefix}{_OWNER}")
    try:
        yield
    finally:
        _remove_shared_memory(prefix)
        _close(descriptor)


def sweep() -> None:
    """Remove the temporary directories and the files in /dev/shm whose owner has ended."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        if (descriptor := _lock(owner, create=False)) is not None:
            shutil.rmtree(owner.parent, ignore_errors=True)
            _close(descriptor)
    for owner in SHARED_MEMORY.glob(f"{_PREFIX}*{_OWNER}"):
        if (descriptor := _lock(owner, create=False)) is not None:
            _remove_shared_memory(owner.name.removesuffix(_OWNER))
            _close(descriptor)


def _remove_shared_memory(prefix: str) -> None:
    files = list(SHARED_MEMORY.glob(f"{prefix}*"))
    for file in sorted(files, key=lambda file: file.name.endswith(_OWNER)):  # the lock last
        with suppress(OSError):
            file.unlink()


def _lock(path: Path, *, create: bool = True) -> int | None:
    """A descriptor that holds the lock of a file; None if another process holds it, or the file cannot be used."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)

"""Files of commands outside their directories: temporary directories, and files in /dev/shm.

Each carries a file that its owner keeps locked. The kernel drops the lock of a process that has ended, however it
ended, in this container or in another that shares the directory: a process that gets the lock may remove the rest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trtqwen.system.guardian import ENVIRONMENTS, remove_environments

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "trtqwen-"
_OWNER = "owner"  # ends the name of the locked file
_YOUNG_SECONDS = 60  # a directory without an owner file may get one


@contextmanager
def workspace(kind: str = "") -> Iterator[Path]:
    """Yield a new temporary directory that only this user can read.

    Args:
        kind: part of its name.
    """
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-" if kind else _PREFIX))
    descriptor = _own(directory / _OWNER)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _close(descriptor)


@contextmanager
def shared_memory(prefix: str) -> Iterator[None]:
    """Own every file in /dev/shm whose name begins with `prefix`, until the block ends."""
    descriptor = _own(SHARED_MEMORY / f"{prefix}{_OWNER}")
    try:
        yield
    finally:
        _remove_shared_memory(prefix)
        _close(descriptor)


def sweep() -> None:
    """Remove the temporary directories and the files in /dev/shm whose owner has ended."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if directory.lstat().st_uid == os.getuid() and directory.is_dir() and not directory.is_symlink():
                _sweep_directory(directory)
    for owner in SHARED_MEMORY.glob(f"{_PREFIX}*{_OWNER}"):
        if (descriptor := _lock(owner)) is not None:
            _remove_shared_memory(owner.name.removesuffix(_OWNER))
            _close(descriptor)
    for unlocked in SHARED_MEMORY.glob(f"{_PREFIX}*{_unowned(_OWNER)}"):
        with suppress(OSError):
            if time.time() - unlocked.stat().st_mtime > _YOUNG_SECONDS:
                unlocked.unlink()


def without_owner(names: Collection[str]) -> set[str]:
    """Return the files of /dev/shm without an owner file. `sweep` removes the others when their owner has ended."""
    owners = [name for name in names if name.startswith(_PREFIX) and name.endswith((_OWNER, _unowned(_OWNER)))]
    owned = tuple(name.removesuffix(".new").removesuffix(_OWNER) for name in owners)
    return {name for name in names if not name.startswith(owned)}


def _sweep_directory(directory: Path) -> None:
    owner = directory / _OWNER
    if not owner.exists():
        # Its owner has ended, or will take it in a moment. Only an empty one is certainly abandoned.
        if time.time() - directory.stat().st_mtime > _YOUNG_SECONDS:
            (directory / _unowned(_OWNER)).unlink(missing_ok=True)
            directory.rmdir()
        return
    if (descriptor := _lock(owner)) is not None:
        remove_environments(os.fspath(directory / ENVIRONMENTS))
        shutil.rmtree(directory, ignore_errors=True)
        _close(descriptor)


def _remove_shared_memory(prefix: str) -> None:
    files = list(SHARED_MEMORY.glob(f"{prefix}*"))
    for file in sorted(files, key=lambda file: file.name.endswith(_OWNER)):  # the lock last
        with suppress(OSError):
            file.unlink()


def _own(path: Path) -> int | None:
    """A descriptor that holds the lock of a new file; None if it cannot be made.

    The file gets its name after it is locked, because a sweep takes an unlocked owner file for that of an ended
    process.
    """
    unlocked = path.with_name(_unowned(path.name))
    try:
        descriptor = os.open(unlocked, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(path)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unowned(name: str) -> str:
    return f"{name}.new"


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file; None if another process holds it, or the file cannot be used."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
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

"""Finished directories: a result is complete or does not exist, even if its process is killed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trtqwen.diagnostics import OutputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def finished_directory(output: Path, *, force: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a fresh temporary sibling of `output`; on success sync it and rename it into place.

    If the process is killed, `output` holds either the old content or the whole result.
    Readers accept a directory only with its manifest, which is written last.

    Args:
        sources: inputs of the result, which must not be inside `output`.

    Raises:
        OutputError: from `check_output`, or if another process is writing it, its parent cannot be written, or the
            disk is full.
    """
    output = destination(output)
    with locked(_sibling(output, "lock"), lambda pid: _refuse_second_writer(output, pid)):
        check_output(output, force=force, sources=sources)
        temporary = _fresh_temporary(output)
        try:
            yield temporary
            _sync_tree(temporary)
            if output.exists():
                _replace(temporary, output)
            else:
                temporary.rename(output)
            _sync_directory(output.parent)
        except OSError as problem:
            if problem.errno in DISK_FULL:
                raise _unwritable(output, problem) from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_file(output: Path, text: str) -> None:
    """Write a text file: the whole of it, or what was there stays.

    Raises:
        OutputError: if it cannot be written.
    """
    output = output.resolve()
    temporary = _sibling(output, "new")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as problem:
        raise _unwritable(output, problem) from None


@contextmanager
def locked(path: Path, on_busy: Callable[[int], None]) -> Iterator[None]:
    """Hold the lock file `path`, with this process's id in it. The kernel releases it if the process ends.

    Args:
        on_busy: called once with the id of the process that holds the lock, before the wait; may raise instead.

    Raises:
        OutputError: if the file cannot be created or written.
    """
    while True:
        with _open_lock(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                on_busy(int(file.read() or 0))
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # who held it has removed it
            try:
                _write_owner(file, path)
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def make_directory(directory: Path) -> None:
    """Create a directory with its parents, unless it exists.

    Raises:
        OutputError: if it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _unwritable(directory, problem) from None


def recover(output: Path) -> None:
    """Restore the old result that a kill during a replacement left next to `output`."""
    output = destination(output)
    retired = _sibling(output, "old")
    if retired.exists() and not output.exists():
        retired.rename(output)


def clear_leftovers(output: Path) -> None:
    """Recover `output`, and remove what killed runs left next to it, unless another process is writing it.

    Raises:
        OutputError: if a leftover cannot be removed.
    """
    output = destination(output)
    if any(_sibling(output, suffix).exists() for suffix in ("lock", "old", "tmp")):
        try:
            with locked(_sibling(output, "lock"), lambda pid: _refuse_second_writer(output, pid)):
                _remove_leftovers(output)
        except _BusyError:
            return


def destination(output: Path) -> Path:
    """Resolve links and names such as `.`, because siblings and renames need the real directory."""
    return output.resolve() if output.is_symlink() or output.name in ("", "..") else output


def check_place(output: Path, sources: Iterable[Path] = ()) -> None:
    """Refuse a path that cannot become an output directory, even with `force`.

    Raises:
        OutputError: if `output` is not a directory, or one of `sources` would be lost with it.
    """
    place = output.resolve()
    if place == place.parent or (place.exists() and not place.is_dir()):
        what = "the root of all directories" if place == place.parent else "not a directory"
        raise OutputError(f"{output}: is {what}", "name another output directory")
    for source in sources:
        if source.resolve().is_relative_to(place):
            raise OutputError(f"{output}: would be replaced, and {source} lost", "name another directory")


def check_output(output: Path, *, force: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse an output directory that `check_place` refuses, or that is not empty unless `force` is set."""
    check_place(output, sources)
    if output.is_dir() and any(output.iterdir()) and not force:
        raise OutputError(f"{output}: exists", "pass --force to replace it or choose another directory")


def _sibling(output: Path, suffix: str) -> Path:
    return output.with_name(f".{output.name}.{suffix}")


class _BusyError(OutputError):
    """Another process is writing the directory."""


def _refuse_second_writer(output: Path, pid: int) -> None:
    raise _BusyError(f"{output}: process {pid} is writing it", "wait until that is done, or choose another directory")


def _open_lock(path: Path) -> TextIO:
    make_directory(path.parent)
    try:
        return path.open("a+", encoding="ascii")
    except OSError as problem:
        raise _unwritable(path.parent, problem) from None


def _write_owner(file: TextIO, path: Path) -> None:
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), str(os.getpid()).encode())  # unbuffered: `close` would write again what failed here
    except OSError as problem:
        raise _unwritable(path.parent, problem) from None


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _unwritable(output: Path, problem: OSError) -> OutputError:
    hint = "free some space, or choose another disk" if problem.errno in DISK_FULL else "choose another place"
    return OutputError(f"{output}: cannot be created or written ({problem.strerror})", hint)


def _fresh_temporary(output: Path) -> Path:
    """Remove leftovers of a killed run next to `output` and create an empty temporary directory. Needs the lock."""
    temporary = _sibling(output, "tmp")
    _remove_leftovers(output)
    make_directory(temporary)
    return temporary


def _remove_leftovers(output: Path) -> None:
    recover(output)
    for leftover in (_sibling(output, "old"), _sibling(output, "tmp")):
        shutil.rmtree(leftover, ignore_errors=True)
        if leftover.exists():
            raise OutputError(f"{leftover}: a killed run left it, and it cannot be removed", "remove it as its owner")


def _replace(temporary: Path, output: Path) -> None:
    """Swap the directories atomically, or in two renames if the file system cannot; `recover` completes these."""
    if not _exchange(temporary, output):
        retired = _sibling(output, "old")
        output.rename(retired)
        temporary.rename(output)
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28
    return renameat2 is not None and not renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir():
            _sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

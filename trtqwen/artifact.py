"""Finished directories and their manifests: a stage's output is complete and accounted for, or does not exist."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import xxhash
from pydantic import BaseModel, ConfigDict

from trtqwen import __version__
from trtqwen.diagnostics import InputError, OutputError

MANIFEST = "manifest.json"
StageName = Literal["checkpoint", "engine", "repository"]
REMEDIES: dict[StageName, str] = {
    "checkpoint": "convert the model again with `trtqwen build`, or with `trtqwen convert --force`",
    "engine": "build it again with `trtqwen build`",
    "repository": "write it again with `trtqwen build`, or with `trtqwen repo --force`",
}
_CHUNK = 1 << 22
_HASHING_THREADS = 8  # xxHash leaves the interpreter's lock: files are hashed in parallel, as fast as the disk reads
_CLOCK_TICK_NS = 50_000_000  # two changes of a file within a tick of the kernel's clock leave the same time stamp
_digests: dict[tuple[int, ...], str] = {}  # by device, inode, size and time stamps
_BYTECODE = "__pycache__"  # Python writes it beside a model that a Triton started by hand has loaded
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class FileRecord(BaseModel):
    """Size in bytes and XXH3-128 digest of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    digest: str


class Manifest(BaseModel):
    """What one stage wrote and from what: the record by which the next stage accepts or refuses it.

    `key` is the digest of tool version, inputs and parameters; a cached result is valid if the keys are equal.
    `warnings` is what was said of the inputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    stage: StageName
    tool_version: str
    key: str
    inputs: dict[str, str]
    parameters: dict[str, Any]
    outputs: dict[str, FileRecord]
    warnings: list[str] = []


def stage_key(
    stage: StageName, inputs: dict[str, str], parameters: dict[str, Any], tool_version: str | None = None
) -> str:
    """Digest of everything that decides a stage's output.

    Args:
        tool_version: the version of trtqwen that writes it; None is this one.
    """
    version = tool_version or __version__
    text = json.dumps([stage, version, inputs, parameters], sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def digest_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, as 32 hex digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _digest_of_unchanged(path: Path) -> str:
    """`digest_file`, once for each state of a file: a process that looks twice, or through two links, reads once."""
    status = path.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if state in _digests:
        return _digests[state]
    digest = digest_file(path)
    if time.time_ns() - status.st_ctime_ns > _CLOCK_TICK_NS:
        _digests[state] = digest
    return digest


@contextmanager
def finished_directory(output: Path, *, force: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a fresh temporary sibling of `output`; on success sync it and rename it into place.

    A process killed at any moment leaves at `output` what was there before or the whole result.
    A reader takes a directory only with its manifest, which is written last.

    Args:
        sources: what the result is made from, and must outlive it.

    Raises:
        OutputError: from `check_output`, or if another process is writing it, or its parent cannot be written.
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
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, on_busy: Callable[[int], None]) -> Iterator[None]:
    """Hold the lock file `path`, which holds this process's id meanwhile; the kernel frees it if the process dies.

    Args:
        on_busy: called once with the id of the process that holds it, before waiting for that; may raise instead.

    Raises:
        OutputError: if the file cannot be created.
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
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def make_directory(directory: Path) -> None:
    """Create a directory with its parents, unless it exists.

    Raises:
        OutputError: if that cannot be done.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(_cannot_create(directory, problem)) from None


def recover(output: Path) -> None:
    """Put back the result that a kill between the two renames of a replacement left beside `output`."""
    output = destination(output)
    retired = _sibling(output, "old")
    if retired.exists() and not output.exists():
        retired.rename(output)


def clear_leftovers(output: Path) -> None:
    """Recover `output`, and remove what killed runs left beside it, unless another process is writing it.

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
    """The directory itself where `output` is a link to it or a name such as `.`; siblings and renames need that."""
    return output.resolve() if output.is_symlink() or output.name in ("", "..") else output


def check_place(output: Path, sources: Iterable[Path] = ()) -> None:
    """Refuse what cannot become an output directory, whatever the user allows to be replaced.

    Raises:
        OutputError: if `output` is not a directory, or one of `sources` would be lost with it.
    """
    place = output.resolve()
    if place == place.parent or (place.exists() and not place.is_dir()):
        raise OutputError(f"{output}: cannot become an output directory", "name another")
    for source in sources:
        if source.resolve().is_relative_to(place):
            raise OutputError(f"{output}: would be replaced, and {source} lost", "name another directory")


def check_output(output: Path, *, force: bool, sources: Iterable[Path] = ()) -> None:
    """Refuse an output directory that exists, unless it is empty or `force` is set, and as `check_place` does."""
    check_place(output, sources)
    if output.is_dir() and any(output.iterdir()) and not force:
        raise OutputError(f"{output}: exists", "pass --force to replace it or choose another directory")


def write_manifest(
    directory: Path,
    stage: StageName,
    inputs: dict[str, str],
    parameters: dict[str, Any],
    known_digests: Mapping[str, str] | None = None,
    *,
    warnings: Sequence[str] = (),
) -> Manifest:
    """Record every file under `directory`; call it last, when the stage's files are complete.

    Args:
        known_digests: digests of files that were taken while writing them, by path relative to `directory`.
        warnings: what was said of the inputs.
    """
    known = known_digests or {}
    outputs = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        outputs[name] = FileRecord(size=path.stat().st_size, digest=known.get(name) or digest_file(path))
    manifest = Manifest(
        stage=stage,
        tool_version=__version__,
        key=stage_key(stage, inputs, parameters),
        inputs=inputs,
        parameters=parameters,
        outputs=outputs,
        warnings=list(warnings),
    )
    (directory / MANIFEST).write_text(_text(manifest), encoding="utf-8")
    return manifest


def load_manifest(directory: Path, stage: StageName) -> Manifest:
    """Read the manifest of a stage and check it in itself, without a look at the stage's files.

    Raises:
        InputError: if the directory is not a result of that stage, or its manifest is not as it was written.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = Manifest.model_validate_json(text)
    except OSError:
        raise InputError(f"{directory}: is not a finished {stage} (no {MANIFEST})", REMEDIES[stage]) from None
    except ValueError:  # pydantic's ValidationError is one, and so is invalid UTF-8
        raise InputError(f"{path}: is not a manifest of this version of trtqwen", REMEDIES[stage]) from None
    key = stage_key(manifest.stage, manifest.inputs, manifest.parameters, manifest.tool_version)
    if text != _text(manifest) or manifest.key != key:
        raise InputError(f"{path}: was changed after it was written", REMEDIES[stage])
    if manifest.stage != stage:
        raise InputError(
            f"{directory}: holds a finished {manifest.stage}, not a {stage}", f"name the {stage} directory"
        )
    return manifest


def damage(directory: Path, manifest: Manifest, *, digests: bool = True) -> str | None:
    """What is wrong with the first file that is not as the manifest says; None if all are.

    Args:
        digests: read every file and compare its digest; otherwise only its size.
    """
    for name, record in manifest.outputs.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.size:
            return f"{name} is missing" if size is None else f"{name} has {size} bytes instead of {record.size}"
    if manifest.stage == "repository" and (strangers := _strangers(directory, manifest)):
        return f"{strangers[0]} does not belong to it"  # Triton would serve such a model, Python import such a module
    if digests:
        names = sorted(manifest.outputs, key=lambda name: -manifest.outputs[name].size)
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            found = pool.map(_digest_of_unchanged, [directory / name for name in names])
            for name, digest in zip(names, found, strict=True):
                if digest != manifest.outputs[name].digest:
                    return f"{name} has other bytes than were written"
    return None


def read_manifest(directory: Path, stage: StageName, *, digests: bool = True) -> Manifest:
    """Read the manifest of a finished stage and check that its files are as they were written.

    Args:
        digests: read every file and compare its digest; otherwise only its size.

    Raises:
        InputError: if the directory is not a finished result of that stage.
    """
    manifest = load_manifest(directory, stage)
    try:
        problem = damage(directory, manifest, digests=digests)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})", REMEDIES[stage]) from None
    if problem:
        raise InputError(f"{directory}: {problem}", REMEDIES[stage])
    return manifest


def cached(directory: Path, stage: StageName, key: str) -> bool:
    """Whether `directory` already holds this very result."""
    try:
        return read_manifest(directory, stage).key == key
    except InputError:
        return False


def _text(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=2) + "\n"


def _strangers(directory: Path, manifest: Manifest) -> list[str]:
    files = (path.relative_to(directory) for path in directory.rglob("*") if not path.is_dir())
    known = {*manifest.outputs, MANIFEST}
    return sorted(file.as_posix() for file in files if file.as_posix() not in known and _BYTECODE not in file.parts)


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
        raise OutputError(_cannot_create(path.parent, problem)) from None


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _cannot_create(directory: Path, problem: OSError) -> str:
    return f"{directory}: cannot be created or written ({problem.strerror}); choose a directory that can be"


def _fresh_temporary(output: Path) -> Path:
    """Clear away what a killed run left beside `output`, whose lock is ours, and start anew."""
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
    """Swap the two in one step; where the file system has none, in two, and `recover` mends a kill between them."""
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

"""Finished directories and their manifests: a stage's output is complete and accounted for, or does not exist."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from trtqwen import __version__
from trtqwen.errors import InputError, OutputError

MANIFEST = "manifest.json"
Stage = Literal["checkpoint", "engine", "repository"]
_CHUNK = 1 << 22


class FileRecord(BaseModel):
    """Size in bytes and XXH3-128 digest of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    digest: str


class Manifest(BaseModel):
    """What one stage wrote and from what: the record by which the next stage accepts or refuses it.

    `key` is the digest of tool version, inputs and parameters; a cached result is valid if the keys are equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    stage: Stage
    tool_version: str
    key: str
    inputs: dict[str, str]
    parameters: dict[str, Any]
    outputs: dict[str, FileRecord]


def stage_key(stage: Stage, inputs: dict[str, str], parameters: dict[str, Any]) -> str:
    """Digest of everything that decides a stage's output."""
    text = json.dumps([stage, __version__, inputs, parameters], sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def digest_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, as 32 hex digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


@contextmanager
def finished_directory(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a fresh temporary sibling of `output`; on success sync it and rename it into place.

    A process killed at any moment leaves either nothing at `output`, what was there before, or the whole result.
    A reader takes a directory only with its manifest, which is written last.

    Raises:
        OutputError: if `output` exists and `force` is not set, or its parent cannot be written.
    """
    check_output(output, force=force)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        _sweep(output)
        temporary.mkdir(parents=True)
    except OSError as problem:
        raise OutputError(
            f"{output}: cannot be created ({problem.strerror}); choose a directory that can be written"
        ) from None
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


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output directory that exists, unless it is empty or `force` is set."""
    if output.is_file():
        raise OutputError(f"{output}: is a file; name a directory")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise OutputError(f"{output}: exists; pass --force to replace it or choose another directory")


def write_manifest(
    directory: Path,
    stage: Stage,
    inputs: dict[str, str],
    parameters: dict[str, Any],
    known_digests: Mapping[str, str] | None = None,
) -> Manifest:
    """Record every file under `directory`; call it last, when the stage's files are complete.

    Args:
        known_digests: digests of files that were taken while writing them, by path relative to `directory`.
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
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: Path, stage: Stage) -> Manifest:
    """Read the manifest of a finished stage and check that its files are there with their sizes.

    Raises:
        InputError: if the directory is not a finished result of that stage.
    """
    path = directory / MANIFEST
    remedy = f"make the {stage} again"
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{directory}: is not a finished {stage} (no {MANIFEST}); {remedy}") from None
    except ValidationError:
        raise InputError(f"{path}: is not a manifest of this version of trtqwen; {remedy}") from None
    if manifest.stage != stage:
        raise InputError(f"{directory}: holds a finished {manifest.stage}, not a {stage}; name the {stage} directory")
    for name, record in manifest.outputs.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {record.size}"
            raise InputError(f"{file}: {state}; {remedy}")
    return manifest


def cached(directory: Path, stage: Stage, key: str) -> bool:
    """Whether `directory` already holds this very result."""
    try:
        return read_manifest(directory, stage).key == key
    except InputError:
        return False


def _sweep(output: Path) -> None:
    """Remove what killed runs left beside `output`."""
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
        pid = leftover.suffixes[-2].lstrip(".")
        if pid.isdecimal() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()):
            shutil.rmtree(leftover, ignore_errors=True)


def _replace(temporary: Path, output: Path) -> None:
    # Two renames: a kill between them leaves the old result beside its place, never a mixture.
    retired = output.with_name(f".{output.name}.{os.getpid()}.old")
    output.rename(retired)
    temporary.rename(output)
    shutil.rmtree(retired)


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

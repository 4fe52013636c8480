"""Manifests: the inputs and output files of a build stage, and a check that the files are unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict

from trtqwen import __version__
from trtqwen.artifact.digest import digest_file, digest_of_unchanged
from trtqwen.diagnostics import InputError

MANIFEST = "manifest.json"
StageName = Literal["checkpoint", "engine", "repository"]
HINTS: dict[StageName, str] = {
    "checkpoint": "convert the model again with `trtqwen build`, or with `trtqwen convert --force`",
    "engine": "build it again with `trtqwen build`",
    "repository": "write it again with `trtqwen build`, or with `trtqwen repo --force`",
}
_HASHING_THREADS = 8  # xxHash leaves the interpreter's lock: files are hashed in parallel, as fast as the disk reads
_BYTECODE = "__pycache__"  # Python writes it next to a model that a user's own Triton has loaded


class FileRecord(BaseModel):
    """Size in bytes and XXH3-128 digest of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    digest: str


class Manifest(BaseModel):
    """The inputs and output files of one stage. The next stage accepts or refuses the result by it.

    `key` is the digest of tool version, inputs and parameters; a cached result is valid if the keys are equal.
    `warnings` are the warnings about the inputs.
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
        warnings: warnings about the inputs.
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
    """Read the manifest of a stage and check its own integrity, but not the stage's files.

    Raises:
        InputError: if the directory is not a result of that stage, or its manifest is not as it was written.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = Manifest.model_validate_json(text)
    except OSError:
        if not directory.exists():
            what = f"{directory}: is not a finished {stage} (the directory does not exist)"
            raise InputError(what, "make it with `trtqwen build`, or name another directory") from None
        raise InputError(f"{directory}: is not a finished {stage} (no {MANIFEST})", HINTS[stage]) from None
    except ValueError:  # pydantic's ValidationError is one, and so is invalid UTF-8
        raise InputError(f"{path}: is not a manifest of this version of trtqwen", HINTS[stage]) from None
    key = stage_key(manifest.stage, manifest.inputs, manifest.parameters, manifest.tool_version)
    if text != _text(manifest) or manifest.key != key:
        raise InputError(f"{path}: was changed after it was written", HINTS[stage])
    if manifest.stage != stage:
        wanted = "an engine" if stage == "engine" else f"a {stage}"
        raise InputError(
            f"{directory}: holds a finished {manifest.stage}, not {wanted}", f"name the {stage} directory"
        )
    return manifest


def damage(directory: Path, manifest: Manifest, *, digests: bool = True) -> str | None:
    """Describe the first file that differs from the manifest; None if all files are unchanged.

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
            found = pool.map(digest_of_unchanged, [directory / name for name in names])
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
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})", HINTS[stage]) from None
    if problem:
        raise InputError(f"{directory}: {problem}", HINTS[stage])
    return manifest


def cached(directory: Path, stage: StageName, key: str) -> bool:
    """Return whether `directory` already holds the result with this key."""
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

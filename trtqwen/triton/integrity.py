"""Integrity of a repository and its engine before they are served: every byte, and that they match."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from trtqwen import __version__
from trtqwen.artifact.directory import clear_leftovers
from trtqwen.artifact.manifest import HINTS, Manifest, load_manifest, read_manifest
from trtqwen.diagnostics import InputError, OutputError


def check_served_files(repository: Path, *, digests: bool = True) -> Manifest:
    """Check a repository and the engine that it serves; returns the repository's manifest.

    Args:
        digests: read every file and compare its digest; otherwise only its size.

    Raises:
        InputError: if one of them is not finished, a file is not as it was written, the repository was written for
            another engine, or by another version of trtqwen.
    """
    clear_build_leftovers(repository)
    manifest = read_manifest(repository, "repository", digests=digests)
    if manifest.tool_version != __version__:
        what = f"{repository}: was written by trtqwen {manifest.tool_version}, this is {__version__}"
        raise InputError(what, HINTS["repository"])
    engine = Path(str(manifest.parameters.get("engine", "")))
    built = read_manifest(engine, "engine", digests=digests)
    if manifest.inputs.get("engine") != built.key:
        what = f"{repository}: was written for another engine than the one that is in {engine} now"
        raise InputError(what, HINTS["repository"])
    return manifest


def clear_build_leftovers(repository: Path) -> None:
    """Remove leftovers of killed builds next to a repository, its engine and their checkpoint, if permitted."""
    places = [repository]
    with suppress(InputError):
        engine = Path(str(load_manifest(repository, "repository").parameters.get("engine", "")))
        places += [engine, engine.with_name("checkpoint")] if engine.name else []
    for place in places:
        with suppress(OutputError, OSError):  # a directory of another user, or mounted read-only
            clear_leftovers(place)

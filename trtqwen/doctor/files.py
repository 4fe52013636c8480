"""Checks that the files of checkpoint, engine and repository are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from trtqwen.artifact.manifest import MANIFEST, Manifest, StageName, read_manifest
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.triton.integrity import check_served_files


class Files(Check):
    """The files of checkpoint, engine and repository are as trtqwen wrote them.

    A repository serves the engine that it was written for.
    """

    id = "D25"
    level = "error"
    title = "file digests"

    def run(self, subject: Subject) -> Result:
        named = {"checkpoint": subject.checkpoint, "engine": subject.engine, "repository": subject.repository}
        if not any(directory is not None and (directory / MANIFEST).is_file() for directory in named.values()):
            raise Skip("give --checkpoint, --engine or --repo, of trtqwen")
        return self.judge(list(dict.fromkeys(_problems(subject))), "every digest matches")


def _problems(subject: Subject) -> Iterator[Diagnostic]:
    checks: tuple[Callable[[], object], ...] = (
        lambda: _read(subject.checkpoint, "checkpoint"),
        lambda: _read(subject.engine, "engine"),
        lambda: _read(subject.repository, "repository"),
        lambda: _served(subject),
    )
    for check in checks:
        try:
            check()
        except InputError as problem:
            yield problem.diagnostic


def _read(directory: Path | None, stage: StageName) -> Manifest | None:
    if directory is None or not (directory / MANIFEST).is_file():
        return None  # made by another tool
    return read_manifest(directory, stage)


def _served(subject: Subject) -> None:
    manifest = _read(subject.repository, "repository")
    if subject.repository is not None and manifest is not None and "engine" in manifest.parameters:
        check_served_files(subject.repository)


CHECKS: tuple[Check, ...] = (Files(),)

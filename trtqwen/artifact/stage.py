"""One stage of a build: what it depends on, whether its result is up to date, and how it is made."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trtqwen import __version__
from trtqwen.artifact.directory import finished_directory
from trtqwen.artifact.manifest import Manifest, StageName, cached, damage, load_manifest, stage_key, write_manifest
from trtqwen.diagnostics import InputError


@dataclass(frozen=True)
class BuildProgress:
    """How far an engine's builder is.

    Attributes:
        line: the builder's latest line.
        ranks_done: rank files there, of `ranks`.
    """

    line: str
    ranks_done: int
    ranks: int


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        why: why it was made; None if an earlier result was taken as it is.
        seconds: time it took.
        nbytes: size of its directory.
    """

    stage: StageName
    directory: Path
    why: str | None
    seconds: float
    nbytes: int

    @property
    def reused(self) -> bool:
        return self.why is None


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class BuildEvents:
    """Who is told what during a build.

    Attributes:
        written: called with the bytes of checkpoint written since the last call.
        calibrated: called with the number of layers calibrated since the last call.
        built: called with every line that trtllm-build prints.
        inspect: called with the conversion's plan, the checkpoint's directory when all but its manifest is written,
            and the activation ranges, if any; may add files.
        on_busy: called with the id of a process that has to be waited for.
        on_stage: called when a stage is complete.
    """

    written: Callable[[int], None] = _ignore
    calibrated: Callable[[int], None] = _ignore
    built: Callable[[BuildProgress], None] = _ignore
    inspect: Callable[[Any, Path, Any], None] = _ignore
    on_busy: Callable[[int], None] = _ignore
    on_stage: Callable[[StageResult], None] = _ignore


class Stage(ABC):
    """A step from input directories to one finished directory.

    Attributes:
        name: as the manifest has it.
        section: the recipe's section that steers it.
        directory: where its result goes.
    """

    name: ClassVar[StageName]
    section: ClassVar[str]
    directory: Path

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """Digests of everything that the result is made of, by name."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What else decides the result: the settings of the recipe's section."""

    @abstractmethod
    def check(self, *, force: bool) -> None:
        """Refuse at once what would fail later.

        Raises:
            TrtQwenError: with the hint.
        """

    @abstractmethod
    def run(self, directory: Path, events: BuildEvents) -> Mapping[str, str]:
        """Write the result's files into an empty directory.

        Returns:
            digests that were taken while writing, by file name.
        """

    @property
    def sources(self) -> tuple[Path, ...]:
        """Directories that the result is made from, and that must outlive it."""
        return ()

    def warnings(self) -> Sequence[str]:
        """What the manifest tells of the inputs."""
        return ()

    def key(self) -> str:
        """The manifest key of the result."""
        return stage_key(self.name, self.inputs(), self.parameters())

    @property
    def done(self) -> bool:
        """Whether the directory already holds this very result."""
        return cached(self.directory, self.name, self.key())

    def make(self, *, force: bool = False, events: BuildEvents | None = None) -> Manifest:
        """Make the result, whether it is up to date or not.

        Args:
            force: replace what is in the directory.

        Raises:
            OutputError: if the directory exists and `force` is not set, or cannot be written.
        """
        with finished_directory(self.directory, force=force, sources=self.sources) as directory:
            digests = self.run(directory, events or BuildEvents())
            return write_manifest(
                directory, self.name, self.inputs(), self.parameters(), digests, warnings=self.warnings()
            )

    def why(self, *, digests: bool = True) -> str | None:
        """Why it has to be made, in words that follow "because"; None if it is done.

        Args:
            digests: read every file of the result and compare its digest; otherwise only its size.
        """
        if not occupied(self.directory):
            return "it is missing"
        try:
            manifest = load_manifest(self.directory, self.name)
        except InputError:
            return "its manifest is missing or damaged"
        if manifest.key == self.key():
            return damage(self.directory, manifest, digests=digests)
        return " and ".join(self._changes(manifest)[:3]) or "what it was made with changed"

    def _changes(self, made: Manifest) -> list[str]:
        if made.tool_version != __version__:
            return [f"trtqwen changed from {made.tool_version} to {__version__}"]
        article = "" if self.name == "checkpoint" else "the "
        settings = [
            f"{self.section}.{name} changed from {_word(made.parameters[name])} to {_word(value)}"
            for name, value in self.parameters().items()
            if name in made.parameters and made.parameters[name] != value
        ]
        inputs = [
            f"{article}{name} changed" for name, digest in self.inputs().items() if made.inputs.get(name) != digest
        ]
        return settings + inputs


def occupied(directory: Path) -> bool:
    """Whether a directory is there and holds anything."""
    return directory.is_dir() and any(directory.iterdir())


def _word(value: Any) -> str:
    """A value as YAML has it: `null`, `true`, `int8_sq`."""
    return value if isinstance(value, str) else json.dumps(value)

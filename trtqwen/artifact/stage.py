"""One stage of a build: its inputs, whether its result is up to date, and how to make it."""

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
    """The progress of an engine's builder.

    Attributes:
        line: the builder's latest line.
        ranks_done: number of finished rank files, of `ranks`.
    """

    line: str
    ranks_done: int
    ranks: int


@dataclass(frozen=True)
class StageResult:
    """The result of a stage in one build.

    Attributes:
        why: why it was made; None if an earlier result was reused.
        seconds: duration.
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
    """Callbacks of a build.

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
        section: the recipe's section with its settings.
        directory: output directory of its result.
    """

    name: ClassVar[StageName]
    section: ClassVar[str]
    directory: Path

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """Return the digests of all inputs of the result, by name."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return the settings of the recipe's section that decide the result."""

    @abstractmethod
    def check(self, *, force: bool) -> None:
        """Check everything that would fail later.

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
        """Return the input directories, which the result must not replace."""
        return ()

    def warnings(self) -> Sequence[str]:
        """Return the warnings about the inputs for the manifest."""
        return ()

    def key(self) -> str:
        """The manifest key of the result."""
        return stage_key(self.name, self.inputs(), self.parameters())

    @property
    def done(self) -> bool:
        """Return whether the directory already holds this result."""
        return cached(self.directory, self.name, self.key())

    def make(self, *, force: bool = False, events: BuildEvents | None = None) -> Manifest:
        """Make the result, even if it is up to date.

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
        """Say why the result must be made, as the end of a sentence with "because"; None if it is up to date.

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
    """Return whether a directory exists and is not empty."""
    return directory.is_dir() and any(directory.iterdir())


def _word(value: Any) -> str:
    """A value as YAML has it: `null`, `true`, `int8_sq`."""
    return value if isinstance(value, str) else json.dumps(value)

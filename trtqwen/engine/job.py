"""The input of a builder, and the protocol of all builders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trtqwen.artifact.stage import BuildProgress
from trtqwen.facts.names import CardName
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe


@dataclass(frozen=True)
class BuildJob:
    """An engine to build.

    Attributes:
        checkpoint: finished checkpoint directory.
        checkpoint_key: its manifest key.
        settings: how the checkpoint was converted.
        ranks: how many files the engine has.
        output: directory of the finished engine.
        serve: serving settings; None if unknown.
        card: the GPU of the engine; None takes this machine's GPU.
    """

    checkpoint: Path
    checkpoint_key: str
    settings: CheckpointRecipe
    ranks: int
    recipe: EngineRecipe
    output: Path
    serve: ServeRecipe | None = None
    card: CardName | None = None


Watch = Callable[[BuildProgress], None]


class EngineBuilder(Protocol):
    """Builds engines of one kind."""

    def check(self, job: BuildJob) -> None:
        """Refuse what cannot be built on this machine.

        Raises:
            EngineError: with the hint.
        """

    def build(self, job: BuildJob, directory: Path, watch: Watch) -> None:
        """Write config.json and one file per rank into an empty directory.

        Raises:
            EngineError: with cause and hint.
        """

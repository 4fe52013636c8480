"""The engine stage: choose the builder of a backend and build the engine from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtqwen.artifact.directory import check_output
from trtqwen.artifact.manifest import Manifest, load_manifest, read_manifest, stage_key
from trtqwen.artifact.names import CONFIG, TOKENIZER_DIRECTORY
from trtqwen.artifact.stage import BuildEvents, Stage
from trtqwen.checkpoint.config import read_checkpoint_config
from trtqwen.diagnostics import InputError
from trtqwen.engine.config import BuildConfig
from trtqwen.engine.flags import NOT_IN_RESULT
from trtqwen.engine.job import BuildJob, EngineBuilder, Watch
from trtqwen.engine.model_builder import ModelBuilder
from trtqwen.engine.torch_builder import TorchBuilder
from trtqwen.engine.trtllm_builder import TrtLlmBuilder
from trtqwen.facts.names import CardName
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, LlmApiSettings, ServeRecipe, VllmSettings
from trtqwen.system.host import Host


def engine_key(checkpoint_key: str, recipe: EngineRecipe) -> str:
    """Return the manifest key of the engine that `build_engine` would write for this checkpoint key.

    The checkpoint's key covers TensorRT-LLM's release and the precision.
    """
    return stage_key("engine", {"checkpoint": checkpoint_key}, engine_parameters(recipe))


def engine_parameters(recipe: EngineRecipe) -> dict[str, Any]:
    """Return the settings of a recipe that change the engine."""
    if recipe.backend == "torch":
        return {"backend": "torch", **BuildConfig.model_validate(recipe.model_dump()).model_dump()}
    if recipe.backend == "llmapi":
        limits = BuildConfig.model_validate(recipe.model_dump()).model_dump()
        return {"backend": "llmapi", "llmapi": (recipe.llmapi or LlmApiSettings()).model_dump(), **limits}
    if recipe.backend == "vllm":
        limits = BuildConfig.model_validate(recipe.model_dump()).model_dump()
        return {"backend": "vllm", "vllm": (recipe.vllm or VllmSettings()).model_dump(), **limits}
    return recipe.model_dump(exclude=set(NOT_IN_RESULT))


def check_max_seq_len(recipe: EngineRecipe, max_position_embeddings: int) -> None:
    """Refuse requests that are longer than the model's context.

    Raises:
        InputError: with the hint.
    """
    if recipe.max_seq_len > max_position_embeddings:
        raise InputError(
            (
                f"engine.max_seq_len {recipe.max_seq_len} exceeds the checkpoint's max_position_embeddings "
                f"{max_position_embeddings}"
            ),
            "lower it in the recipe, or stretch the context by checkpoint.yarn_factor",
        )


@dataclass
class EngineStage(Stage):
    """The second stage of a build.

    Args:
        checkpoint: the checkpoint's directory; it may not exist before `run`.
        checkpoint_key: its manifest key.
        serve: serving settings; an engine that cannot be served with them is refused.
        card: the GPU of the engine; None takes this machine's GPU.
        host: this machine; None reads its facts.
    """

    name = section = "engine"

    checkpoint: Path
    checkpoint_key: str
    recipe: EngineRecipe
    directory: Path
    serve: ServeRecipe | None = None
    card: CardName | None = None
    host: Host | None = None

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.checkpoint,)

    def inputs(self) -> dict[str, str]:
        return {"checkpoint": self.checkpoint_key}

    def parameters(self) -> dict[str, Any]:
        return engine_parameters(self.recipe)

    def check(self, *, force: bool) -> None:
        """Read the finished checkpoint, and check that this machine can build its engine.

        Raises:
            InputError: if the checkpoint is not finished or does not carry the recipe's limits.
            EngineError: if the engine cannot be built on this machine.
            OutputError: if `directory` exists and `force` is not set.
        """
        job = self._job()
        check_output(self.directory, force=force, sources=self.sources)
        self._builder().check(job)

    def run(self, directory: Path, events: BuildEvents) -> Mapping[str, str]:
        """Build the engine.

        Raises:
            EngineError: if building it fails.
        """
        job, checkpoint = self._job(), self.checkpoint
        self._builder().build(job, directory, events.built)
        if (checkpoint / TOKENIZER_DIRECTORY).is_dir():
            shutil.copytree(checkpoint / TOKENIZER_DIRECTORY, directory / TOKENIZER_DIRECTORY)
        outputs = load_manifest(checkpoint, "checkpoint").outputs
        return {name: record.digest for name, record in outputs.items() if name != CONFIG}

    def _builder(self) -> EngineBuilder:
        if self.recipe.backend == "torch":
            return TorchBuilder()
        if self.recipe.backend in ("vllm", "llmapi"):
            return ModelBuilder()
        return TrtLlmBuilder(self.host)

    def _job(self) -> BuildJob:
        manifest = read_manifest(self.checkpoint, "checkpoint")
        if manifest.key != self.checkpoint_key:
            raise InputError(f"{self.checkpoint}: another process has replaced it", "run the command again")
        config = read_checkpoint_config(self.checkpoint)
        check_max_seq_len(self.recipe, config.max_position_embeddings)
        return BuildJob(
            checkpoint=self.checkpoint,
            checkpoint_key=manifest.key,
            settings=_settings(manifest, self.checkpoint),
            ranks=config.mapping.world_size,
            recipe=self.recipe,
            output=self.directory,
            serve=self.serve,
            card=self.card,
        )


def build_engine(
    checkpoint: Path,
    recipe: EngineRecipe,
    output: Path,
    *,
    force: bool = False,
    serve: ServeRecipe | None = None,
    card: CardName | None = None,
    host: Host | None = None,
    watch: Watch = lambda progress: None,
) -> Manifest:
    """Build the engine of a finished checkpoint; the arguments are those of `EngineStage`.

    Raises:
        InputError: if the checkpoint is not finished or does not carry the recipe's limits.
        EngineError: if the engine cannot be built on this machine, or building it fails.
        OutputError: if `output` exists and `force` is not set.
    """
    key = read_manifest(checkpoint, "checkpoint").key
    stage = EngineStage(checkpoint, key, recipe, output, serve, card, host)
    stage.check(force=force)
    return stage.make(force=force, events=BuildEvents(built=watch))


def _settings(source: Manifest, checkpoint: Path) -> CheckpointRecipe:
    try:
        return CheckpointRecipe.model_validate(source.parameters)
    except ValidationError:
        raise InputError(
            (
                f"{checkpoint}: was converted by trtqwen {source.tool_version} with settings that this "
                "version does not know"
            ),
            "convert the model again",
        ) from None

"""From a checkpoint to an engine: the choice of the builder, and what all builders have in common."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtqwen.artifact import Manifest, check_output, finished_directory, read_manifest, stage_key, write_manifest
from trtqwen.checkpoint.config import read_checkpoint_config
from trtqwen.diagnostics import InputError
from trtqwen.engine.config import BuildConfig
from trtqwen.engine.flags import NOT_IN_RESULT
from trtqwen.engine.job import BuildJob, EngineBuilder, Watch
from trtqwen.engine.torch_builder import TorchBuilder
from trtqwen.engine.trtllm_builder import TrtLlmBuilder
from trtqwen.engine.vllm_builder import VllmBuilder
from trtqwen.facts.names import CardName
from trtqwen.layout import CONFIG, TOKENIZER_DIRECTORY
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe, VllmSettings
from trtqwen.system.host import Host


def engine_key(checkpoint_key: str, recipe: EngineRecipe) -> str:
    """The manifest key of the engine that `build_engine` would write from a checkpoint with this key.

    The checkpoint's key covers TensorRT-LLM's release and the precision.
    """
    return stage_key("engine", {"checkpoint": checkpoint_key}, engine_parameters(recipe))


def engine_parameters(recipe: EngineRecipe) -> dict[str, Any]:
    """What of a recipe changes the engine."""
    if recipe.backend == "torch":
        return {"backend": "torch", **BuildConfig.model_validate(recipe.model_dump()).model_dump()}
    if recipe.backend == "vllm":
        limits = BuildConfig.model_validate(recipe.model_dump()).model_dump()
        return {"backend": "vllm", "vllm": (recipe.vllm or VllmSettings()).model_dump(), **limits}
    return recipe.model_dump(exclude=set(NOT_IN_RESULT))


def check_max_seq_len(recipe: EngineRecipe, max_position_embeddings: int) -> None:
    """Refuse requests that are longer than the model's context.

    Raises:
        InputError: with the remedy.
    """
    if recipe.max_seq_len > max_position_embeddings:
        raise InputError(
            (
                f"engine.max_seq_len {recipe.max_seq_len} exceeds the model's max_position_embeddings "
                f"{max_position_embeddings}"
            ),
            "lower it in the recipe, or stretch the context by checkpoint.yarn_factor",
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
    """Build the engine of a finished checkpoint.

    Args:
        serve: how the engine will be served: one that cannot be served so is refused.
        card: the GPU it is for; None takes the one that is here.
        host: this machine; None looks at it.
        watch: called with every line that trtllm-build prints.

    Raises:
        InputError: if the checkpoint is not finished or does not carry the recipe's limits.
        EngineError: if the engine cannot be built on this machine, or building it fails.
        OutputError: if `output` exists and `force` is not set.
    """
    source = read_manifest(checkpoint, "checkpoint")
    config = read_checkpoint_config(checkpoint)
    check_max_seq_len(recipe, config.max_position_embeddings)
    check_output(output, force=force, sources=[checkpoint])
    job = BuildJob(
        checkpoint=checkpoint,
        checkpoint_key=source.key,
        settings=_settings(source, checkpoint),
        ranks=config.mapping.world_size,
        recipe=recipe,
        output=output,
        serve=serve,
        card=card,
    )
    builder = _builder(recipe, host)
    builder.check(job)
    with finished_directory(output, force=force, sources=[checkpoint]) as directory:
        builder.build(job, directory, watch)
        if (checkpoint / TOKENIZER_DIRECTORY).is_dir():
            shutil.copytree(checkpoint / TOKENIZER_DIRECTORY, directory / TOKENIZER_DIRECTORY)
        known = {name: record.digest for name, record in source.outputs.items() if name != CONFIG}
        return write_manifest(directory, "engine", {"checkpoint": source.key}, engine_parameters(recipe), known)


def _builder(recipe: EngineRecipe, host: Host | None) -> EngineBuilder:
    if recipe.backend == "torch":
        return TorchBuilder()
    return VllmBuilder() if recipe.backend == "vllm" else TrtLlmBuilder(host)


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

"""From a checkpoint to an engine: the torch builder, the trtllm-build builder, and the choice between them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from trtqwen.artifact import Manifest, finished_directory, read_manifest, stage_key, write_manifest
from trtqwen.checkpoint.config import read_checkpoint_config
from trtqwen.checkpoint.convert import TOKENIZER_DIRECTORY
from trtqwen.engine.config import BuildConfig
from trtqwen.errors import EngineError, InputError
from trtqwen.recipe import EngineRecipe


def engine_key(checkpoint_key: str, recipe: EngineRecipe) -> str:
    """The manifest key of the engine that `build_engine` would write from a checkpoint with this key."""
    return stage_key("engine", {"checkpoint": checkpoint_key}, recipe.model_dump())


def build_engine(checkpoint: Path, recipe: EngineRecipe, output: Path, *, force: bool = False) -> Manifest:
    """Build the engine of a finished checkpoint.

    Raises:
        InputError: if the checkpoint is not finished or does not carry the recipe's limits.
        EngineError: if the builder is not on this machine.
        OutputError: if `output` exists and `force` is not set.
    """
    source = read_manifest(checkpoint, "checkpoint")
    config = read_checkpoint_config(checkpoint)
    if recipe.max_seq_len > config.max_position_embeddings:
        raise InputError(
            f"engine.max_seq_len {recipe.max_seq_len} exceeds the model's max_position_embeddings "
            f"{config.max_position_embeddings}; lower it in the recipe"
        )
    if recipe.builder == "tensorrt_llm":
        raise EngineError(_no_trtllm_build(checkpoint, recipe, output))
    with finished_directory(output, force=force) as directory:
        _write_torch_engine(checkpoint, source, recipe, directory)
        known = {name: record.digest for name, record in source.outputs.items() if name != "config.json"}
        return write_manifest(directory, "engine", {"checkpoint": source.key}, recipe.model_dump(), known)


def _write_torch_engine(checkpoint: Path, source: Manifest, recipe: EngineRecipe, directory: Path) -> None:
    """The embedded engine executes the checkpoint's own rank files: they are linked, or copied across disks."""
    pretrained = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    build = BuildConfig.model_validate(recipe.model_dump())
    layout = source.parameters["int8_layout"]
    content = {
        "builder": "torch",
        "int8_layout": None if layout == "plain" else layout,
        "pretrained_config": pretrained,
        "build_config": build.model_dump(),
    }
    (directory / "config.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    for rank in range(pretrained["mapping"]["world_size"]):
        name = f"rank{rank}.safetensors"
        try:
            os.link(checkpoint / name, directory / name)
        except OSError:
            shutil.copyfile(checkpoint / name, directory / name)
    if (checkpoint / TOKENIZER_DIRECTORY).is_dir():
        shutil.copytree(checkpoint / TOKENIZER_DIRECTORY, directory / TOKENIZER_DIRECTORY)


def trtllm_build_command(checkpoint: Path, recipe: EngineRecipe, output: Path) -> list[str]:
    """The `trtllm-build` call of TensorRT-LLM 1.2.1 for a recipe."""
    return [
        "trtllm-build",
        f"--checkpoint_dir={checkpoint}",
        f"--output_dir={output}",
        f"--max_batch_size={recipe.max_batch_size}",
        f"--max_num_tokens={recipe.max_num_tokens}",
        f"--max_seq_len={recipe.max_seq_len}",
        f"--tokens_per_block={recipe.tokens_per_block}",
        f"--gemm_plugin={recipe.gemm_plugin}",
        f"--use_paged_context_fmha={'enable' if recipe.use_paged_context_fmha else 'disable'}",
        f"--workers={recipe.workers}",
    ]


def _no_trtllm_build(checkpoint: Path, recipe: EngineRecipe, output: Path) -> str:
    command = " ".join(trtllm_build_command(checkpoint, recipe, output))
    if shutil.which("trtllm-build"):
        return f"the checkpoint is written, but trtqwen does not run trtllm-build yet; run it yourself: {command}"
    return (
        "trtllm-build is not on this machine: the checkpoint is written, build the engine where "
        f"TensorRT-LLM 1.2.1 is installed with: {command}"
    )

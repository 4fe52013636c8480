"""Checkpoints for the builders: the bundled model, and published ones without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trtqwen.artifact.manifest import write_manifest
from trtqwen.checkpoint.config import checkpoint_config
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.demo import MODEL
from trtqwen.hf.config import stretched
from trtqwen.hf.known import known_config
from trtqwen.recipe import CheckpointRecipe, Recipe

ALGORITHM = {"none": None, "int8_wo": "W8A16", "int8_sq": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in bfloat16 for two ranks."""
    out = tmp_path_factory.mktemp("backend") / "checkpoint"
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="bfloat16", tp_size=2)), out)
    return out


@pytest.fixture
def weightless(tmp_path: Path) -> Callable[[Recipe], Path]:
    """Writes config.json of the checkpoint that a recipe would convert from its published model."""

    def make(recipe: Recipe) -> Path:
        settings = recipe.checkpoint
        hf = known_config(recipe.model or "qwen2.5-7b")
        if settings.yarn_factor:
            hf = stretched(hf, settings.yarn_factor)
        content = checkpoint_config(
            hf,
            "bfloat16" if settings.dtype == "auto" else settings.dtype,
            RankMapping(settings.tp_size, settings.pp_size),
            quantization={
                "quant_algo": ALGORITHM[settings.quant],
                "kv_cache_quant_algo": "INT8" if settings.kv_cache == "int8" else None,
            },
            embedding_sharding=settings.embedding_sharding,
            calibrated=settings.calibrated,
            release=settings.release,
        )
        path = tmp_path / "weightless" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return make


def rewrite_manifest(checkpoint: Path, **changes: object) -> None:
    """Account again for a checkpoint whose files were changed, with other settings."""
    parameters = {**CheckpointRecipe(dtype="bfloat16", tp_size=2).model_dump(), **changes}
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, "checkpoint", {}, parameters)

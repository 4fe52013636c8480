"""Checkpoints of the bundled model in any precision, made once, and copies of them with one thing wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.quantize.ranges import ACT_RANGES
from trtqwen.quantize.texts import HELDOUT
from trtqwen.recipe import CheckpointRecipe
from trtqwen.verify.samples import read_samples

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def bundled_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Converts the bundled model once for each set of options; calibrates once for all."""
    home = tmp_path_factory.mktemp("checkpoints")
    calibrated = home / "calibrated"

    def make(**options: Any) -> Path:
        recipe = CheckpointRecipe(**options)
        if recipe.calibrated:
            if not calibrated.exists():
                run_conversion(plan_conversion(MODEL, CheckpointRecipe(kv_cache="int8")), calibrated)
            recipe = recipe.model_copy(update={"act_ranges": str(calibrated / ACT_RANGES)})
        output = home / ("-".join(f"{key}={value}" for key, value in sorted(options.items())) or "default")
        if not output.exists():
            run_conversion(plan_conversion(MODEL, recipe), output)
        return output

    return make


@pytest.fixture(scope="session")
def samples() -> list[list[int]]:
    return read_samples(MODEL, HELDOUT, 1024)


def mutated(checkpoint: Path, output: Path, change: Callable[[list[Tensors], dict[str, Any]], None]) -> Path:
    """A copy without manifest, its rank files and config.json changed."""
    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("manifest.json"))
    files = sorted(output.glob("rank*.safetensors"))
    ranks = [load_file(path) for path in files]
    config = json.loads((output / "config.json").read_text())
    change(ranks, config)
    for path, tensors in zip(files, ranks, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    (output / "config.json").write_text(json.dumps(config))
    return output

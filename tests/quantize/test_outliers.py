"""What makes a model hard to quantize, and the refusal of an INT8 KV cache for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command_line import trtqwen
from tests.errors import parse_error
from tests.models import random_model
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.diagnostics import InputError
from trtqwen.hf.source import HfModel
from trtqwen.quantize.outliers import bias_norms, channel_outliers, check_int8_kv_cache
from trtqwen.quantize.smoothquant import ActivationRange
from trtqwen.recipe import CheckpointRecipe


@pytest.fixture
def spiked(tmp_path: Path) -> Path:
    """Six layers, the k_proj biases of the first and last as large as Qwen2.5-7B's are."""
    model = random_model(num_hidden_layers=6)
    with torch.no_grad():
        for index, factor in ((0, 27.5), (5, 41.9)):
            model.model.layers[index].self_attn.k_proj.bias.mul_(factor)
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_biases_within_the_rule_pass(tmp_path: Path) -> None:
    model = random_model(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "hf")
    check_int8_kv_cache(HfModel(tmp_path / "hf"))
    norms = [float(layer.self_attn.k_proj.bias.detach().norm()) for layer in model.model.layers]
    assert bias_norms(HfModel(tmp_path / "hf")) == pytest.approx(norms, rel=1e-5)


def test_the_layers_that_break_the_rule_are_named(spiked: Path, tmp_path: Path) -> None:
    plan = plan_conversion(spiked, CheckpointRecipe(kv_cache="int8"))
    with pytest.raises(InputError, match=r"\d\d \(layer 0\), \d\d \(layer 5\) times the median.*pass --force"):
        run_conversion(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_without_force(spiked: Path, tmp_path: Path) -> None:
    command = ["convert", spiked, "-o", tmp_path / "out", "--json", "--quant", "int8_wo", "--kv-cache", "int8"]
    result = trtqwen(*command)
    assert result.returncode == 2
    parse_error(result.stderr)
    assert "(layer 5) times the median" in result.stderr
    result = trtqwen(*command, "--force", "--dry-run")
    assert json.loads(result.stdout)["kv_cache"] == "int8"


def test_channel_outliers_are_ratios_to_the_median() -> None:
    ranges = {"a": ActivationRange(np.array([1, 2, 3, 40, 2], np.float32), np.ones(3, np.float32))}
    assert channel_outliers(ranges) == {"a": 20.0}

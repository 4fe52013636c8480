"""Exports are as near to the model as their checkpoints, NVIDIA's own included; broken ones are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import trtqwen
from tests.export.test_export import GOLDEN
from tests.slow import slow
from tests.verify.conftest import Make, Tensors
from tests.verify.test_verify import random_samples
from trtqwen.demo import MODEL
from trtqwen.diagnostics import CheckpointError, InputError
from trtqwen.export.export import plan_export, run_export
from trtqwen.verify.run import Verification, verify

SQ: dict[str, Any] = {"quant": "int8_sq", "per_channel": True}
WO: dict[str, Any] = {"quant": "int8_wo", "int8_layout": "sm80", "dtype": "float16"}


def distance(result: Verification) -> float:
    assert result.comparison is not None
    return result.comparison.head.kl_mean


@pytest.mark.parametrize(
    ("options", "activations", "precision", "factor"),
    [
        slow({"dtype": "bfloat16", "tp_size": 2}, "16bit", "bfloat16", 1.001),
        slow({"dtype": "float32"}, "16bit", "float32", 1.001),
        slow(WO, "16bit", "W8A16 float16", 1.05),  # vLLM's kernels take scales in 16 bits
        slow(
            WO, "int8", "W8A8 float16 (per token)", 5
        ),  # inputs in INT8 too, and nothing smoothed: the price is told
        slow({**SQ, "per_token": True, "tp_size": 2}, "16bit", "W8A8 bfloat16 (per token)", 1.05),
        (SQ, "16bit", "W8A8 bfloat16 (static)", 1.05),
    ],
    ids=["bfloat16", "float32", "weight-only", "weight-only-int8-inputs", "per-token", "static"],
)
def test_exports_are_as_near_as_their_checkpoints(
    bundled_checkpoint: Make,
    samples: list[list[int]],
    tmp_path: Path,
    options: dict[str, Any],
    activations: Any,
    precision: str,
    factor: float,
) -> None:
    checkpoint = bundled_checkpoint(**options)
    run_export(plan_export(checkpoint, activations), tmp_path / "out")
    result, source = (verify(directory, MODEL, samples) for directory in (tmp_path / "out", checkpoint))
    assert result.problems == []
    assert result.precision == precision
    assert distance(result) <= factor * distance(source) + 1e-9


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("g02_bf16_tp2_tied", {}),
        ("g05_parallel_embedding_dim0_oddvocab_tp2", {}),
        ("g07_int8wo_fp16_tp2", {"activations": "int8"}),
        ("g10_sq_perchannel_static_bf16_tp2", {}),
        ("g13_sq_pertoken_pertensor_fp16_tp1_int8kv", {}),
    ],
)
def test_exports_of_nvidias_checkpoints(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    run_export(plan_export(GOLDEN / case / "expected", **options), tmp_path / "out")
    result = verify(tmp_path / "out", GOLDEN / case / "hf", random_samples(500), limits={"top1": 0.7})
    assert result.problems == []


@pytest.fixture(scope="module")
def static(bundled_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "static"
    run_export(plan_export(bundled_checkpoint(**SQ)), output)
    return output


def broken(source: Path, output: Path, change: Any) -> Path:
    shutil.copytree(source, output)
    tensors, config = load_file(output / "model.safetensors"), json.loads((output / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text(json.dumps(config))
    return output


LAYER = "model.layers.2"


def saturated(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.mlp.down_proj.input_scale"] *= 0.05


def without_smoothers(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.mlp.up_proj.weight_scale"] *= 1.5


def missing(tensors: Tensors, config: dict[str, Any]) -> None:
    del tensors[f"{LAYER}.self_attn.q_proj.weight_scale"]


def other_rows(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"][7] += 1


def infinite(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors[f"{LAYER}.input_layernorm.weight"][3] = torch.inf


def other_epsilon(tensors: Tensors, config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = 1e-3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (saturated, "layer 2 is wrong: its mlp differs from the model's by"),
        (without_smoothers, "layer 2 is wrong: its mlp differs from the model's by"),
        (missing, f"tensor '{LAYER}.self_attn.q_proj.weight' has no scale"),
        (other_rows, "1 rows of model.embed_tokens.weight are not the model's"),
        (infinite, f"tensor model.safetensors: {LAYER}.input_layernorm.weight holds infinities or NaNs"),
        (other_epsilon, "config.json says rms_norm_eps 0.001, but the model has 1e-06"),
    ],
)
def test_broken_exports_are_found(
    static: Path, samples: list[list[int]], tmp_path: Path, change: Any, problem: str
) -> None:
    result = verify(broken(static, tmp_path / "out", change), MODEL, samples[:1])
    assert problem in result.problems[0]
    assert result.diagnostic is not None
    assert "export the checkpoint again" in result.diagnostic.hint


def test_what_another_tool_has_quantized_is_refused(static: Path, samples: list[list[int]], tmp_path: Path) -> None:
    def four_bits(tensors: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4

    with pytest.raises(CheckpointError, match="quantized in a way that `trtqwen export` does not write"):
        verify(broken(static, tmp_path / "out", four_bits), MODEL, samples[:1])
    with pytest.raises(InputError, match="has no INT8 layout"):
        verify(static, MODEL, samples[:1], int8_layout="sm80")


def test_the_command_takes_an_export(static: Path) -> None:
    words = ["verify", str(static), "--model", str(MODEL), "--max-tokens", "200", "--json"]
    done = trtqwen(*words)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert (content["ok"], content["precision"]) == (True, "W8A8 bfloat16 (static)")
    assert content["head"]["kl_mean"] < content["thresholds"]["kl"]

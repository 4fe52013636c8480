"""The executor on every kind of checkpoint: other layouts answer the same, INT8 ones as their formulas say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.models import random_model
from tests.slow import slow
from trtqwen.checkpoint.config import read_checkpoint_config
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.checkpoint.reader import read_rank
from trtqwen.engine.builder import build_engine
from trtqwen.executor.executor import Executor
from trtqwen.executor.layer import RankLayer
from trtqwen.executor.linear import LinearLoader
from trtqwen.executor.request import Request
from trtqwen.hf.source import HfModel
from trtqwen.quantize.calibrate import calibrate
from trtqwen.quantize.ranges import LINEARS, write_ranges
from trtqwen.quantize.smoothquant import ActivationRange
from trtqwen.recipe import CheckpointRecipe, EngineRecipe

PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 7, 30)]
LIMITS = EngineRecipe(backend="torch", max_batch_size=4, max_num_tokens=32, max_seq_len=128, tokens_per_block=16)
CPU = torch.device("cpu")


def greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **options)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def run(source: Path, home: Path, settings: CheckpointRecipe) -> list[list[int]]:
    run_conversion(plan_conversion(source, settings), home / "checkpoint")
    build_engine(home / "checkpoint", LIMITS, home / "engine")
    with Executor(home / "engine") as executor:
        answers = executor.generate(
            [Request(id=str(i), input_token_ids=p, max_tokens=10) for i, p in enumerate(PROMPTS)]
        )
    assert all(answer[-1].error is None for answer in answers)
    return [[token for response in answer for token in response.token_ids] for answer in answers]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({"num_hidden_layers": 3}, {"tp_size": 2, "pp_size": 2}),  # uneven stages
        slow({"num_hidden_layers": 4}, {"pp_size": 3}),
        ({"num_key_value_heads": 2}, {"tp_size": 4}),  # repeated KV heads
        ({}, {"tp_size": 2, "embedding_sharding": "vocab"}),  # 515 rows need padding
        ({"tie_word_embeddings": True}, {"tp_size": 2, "embedding_sharding": "hidden"}),
        ({"rope_scaling": YARN}, {}),
    ],
)
def test_every_float_layout_answers_like_transformers(
    hf_directory: Callable[..., Path], tmp_path: Path, shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    options = {"initializer_range": 0.1, **shape}
    expected = [greedy(random_model(**options), prompt) for prompt in PROMPTS]
    assert run(hf_directory(**options), tmp_path, CheckpointRecipe(dtype="float32", **settings)) == expected


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """W8A16 from its definition, in float64: 128 steps to the largest of each row, halves away from zero."""
    step = weight.double().abs().amax(dim=1, keepdim=True) / 128
    codes = ((weight.double() / step).abs() + 0.5).floor().copysign(weight.double()).clamp(-128, 127)
    return (codes * step.half().double()).float()


@pytest.mark.parametrize("layout", ["plain", "sm80", "sm90"])
def test_weight_only_computes_with_the_rounded_weights(
    hf_directory: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    options: dict[str, Any] = {"initializer_range": 0.1, "dtype": torch.float16}
    model = random_model(**options).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(by_hand(parameter))
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    settings = CheckpointRecipe(quant="int8_wo", int8_layout=layout)  # type: ignore[arg-type]
    assert run(hf_directory(**options), tmp_path, settings) == expected


@pytest.fixture
def act_ranges(tmp_path: Path) -> Callable[[Path], str]:
    """Ranges that hold for inputs in [-1, 1], as every test below sends them."""

    def make(source: Path) -> str:
        model, ranges = HfModel(source), {}
        for layer in range(model.config.num_hidden_layers):
            for linear in LINEARS:
                weight = model.tensor(f"model.layers.{layer}.{linear}.weight").astype(np.float32)
                outputs = np.abs(weight).sum(axis=1) + 4
                ranges[f"model.layers.{layer}.{linear}"] = ActivationRange(
                    np.ones(weight.shape[1], np.float32), outputs.astype(np.float32)
                )
        write_ranges(ranges, tmp_path / "ranges.safetensors")
        return str(tmp_path / "ranges.safetensors")

    return make


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_smoothquant_linears_come_close_to_the_float_ones(
    hf_directory: Callable[..., Path],
    act_ranges: Callable[[Path], str],
    tmp_path: Path,
    per_channel: bool,
    per_token: bool,
) -> None:
    """All five linears of both ranks, against the source's own matrices. Norms have taken their smoother along."""
    source = hf_directory(dtype=torch.float16)
    settings = CheckpointRecipe(
        quant="int8_sq", per_channel=per_channel, per_token=per_token, tp_size=2, act_ranges=act_ranges(source)
    )
    run_conversion(plan_conversion(source, settings), tmp_path / "out")
    config = read_checkpoint_config(tmp_path / "out")
    state = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    loader = LinearLoader(config, None, torch.float32, CPU)
    torch.manual_seed(0)
    target, hf = "transformer.layers.1", "model.layers.1"
    partial: dict[str, torch.Tensor] = {}
    for rank in range(2):
        tensors = dict(read_rank(tmp_path / "out", rank))
        for name, module, norm, to_int in [
            ("attention.dense", "self_attn.o_proj", None, "attention.quantization_scaling_factor"),
            ("mlp.fc", "mlp.gate_proj", "post_layernorm", "post_layernorm.scale_to_int"),
            ("mlp.gate", "mlp.up_proj", "post_layernorm", "post_layernorm.scale_to_int"),
            ("mlp.proj", "mlp.down_proj", None, "mlp.quantization_scaling_factor"),
        ]:
            weight = state[f"{hf}.{module}.weight"]
            hidden = torch.rand(20, weight.shape[1], generator=torch.Generator().manual_seed(1)) * 2 - 1
            expected = hidden @ weight.T
            linear = loader.load(tensors, f"{target}.{name}", f"{target}.{to_int}")
            if norm is None:
                share = hidden.chunk(2, dim=1)[rank]
                partial[name] = partial.get(name, torch.zeros(1)) + linear(share)
                if rank == 1:
                    assert relative(partial[name], expected) < 0.03
            else:
                gain = torch.from_numpy(tensors[f"{target}.{norm}.weight"].astype(np.float32))
                smoothed = hidden * gain / state[f"{hf}.post_attention_layernorm.weight"]
                assert relative(linear(smoothed), expected.chunk(2, dim=1)[rank]) < 0.03


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_an_int8_kv_cache_rounds_keys_and_values(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_directory(dtype=torch.float16)
    write_ranges(calibrate(HfModel(source), [list(range(40))]), tmp_path / "ranges.safetensors")
    settings = CheckpointRecipe(kv_cache="int8", act_ranges=str(tmp_path / "ranges.safetensors"))
    run_conversion(plan_conversion(source, settings), tmp_path / "out")
    config = read_checkpoint_config(tmp_path / "out")
    tensors = dict(read_rank(tmp_path / "out", 0))
    step = float(tensors["transformer.layers.0.attention.kv_cache_scaling_factor"][0])
    loader = LinearLoader(config, None, torch.float32, CPU)
    layer = RankLayer(config, tensors, "transformer.layers.0", loader, torch.float32, CPU)
    turn = torch.ones(4, 1, 16), torch.zeros(4, 1, 16)
    _, key, value = layer.qkv(torch.randn(4, 128), *turn)
    for tensor in (key, value):
        codes = tensor / step
        torch.testing.assert_close(codes, codes.round())
        assert codes.abs().max() > 3

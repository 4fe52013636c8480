"""The fused model against the plain one, logits of every precision; on CPU the kernels run interpreted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.slow import slow
from trtqwen.checkpoint.config import read_checkpoint_config
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.checkpoint.reader import read_rank
from trtqwen.executor.attention import AttentionBatch, PlainAttention
from trtqwen.executor.cuda.batch import CudaBatch, context_tiles, with_tiles
from trtqwen.executor.cuda.model import CudaModel
from trtqwen.executor.cuda.shapes import GraphShape, idle, pad
from trtqwen.executor.cuda.weights import from_layout, quantize_weights
from trtqwen.executor.inputs import StepInputs, pack
from trtqwen.executor.model import Qwen2Model
from trtqwen.executor.parallel import SingleRank
from trtqwen.executor.request import Request
from trtqwen.executor.scheduler import Scheduler, SchedulerConfig
from trtqwen.hf.source import HfModel
from trtqwen.quantize.calibrate import calibrate
from trtqwen.quantize.ranges import write_ranges
from trtqwen.quantize.weight_only import quantize, to_layout
from trtqwen.recipe import CheckpointRecipe

# The interpreter computes masked lanes too, in numpy, which warns of what is in them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOKENS_PER_BLOCK, BLOCKS = 16, 24
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"dtype": "float32"}, 1e-5),
    "float16": ({"dtype": "float16"}, 4e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 3e-2),
    "weight-only, plain": ({"dtype": "float16", "quant": "int8_wo"}, 4e-3),
    "weight-only, sm80": ({"dtype": "float16", "quant": "int8_wo", "int8_layout": "sm80"}, 4e-3),
    "weight-only, sm90": ({"dtype": "bfloat16", "quant": "int8_wo", "int8_layout": "sm90"}, 3e-2),
    "smoothquant": ({"dtype": "float16", "quant": "int8_sq"}, 3e-2),
    "smoothquant, per channel": ({"dtype": "float16", "quant": "int8_sq", "per_channel": True}, 3e-2),
    "smoothquant, per token": ({"dtype": "float16", "quant": "int8_sq", "per_token": True}, 3e-2),
    "smoothquant, both": (
        {"dtype": "float16", "quant": "int8_sq", "per_channel": True, "per_token": True},
        3e-2,
    ),
    "int8 kv cache": ({"dtype": "float16", "kv_cache": "int8"}, 2e-2),
}
# Interpreted, each head is a program, and products in float16 take long.
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Interpreted, each takes seconds. The kernels of the others are in `test_kernels`.
QUICK = ("float32",)
SHAPES = (GraphShape(4), GraphShape(3, 32))
CARDS_ALONE = ("weight-only, sm80", "smoothquant, per channel", "smoothquant, per token")


def run(model: CudaModel, inputs: StepInputs, device: torch.device) -> torch.Tensor:
    tiles = context_tiles(inputs)
    data = torch.from_numpy(with_tiles(inputs, tiles)).to(device)
    return logits_of(model, CudaBatch.of(data, inputs, len(tiles)))


def replay(model: CudaModel, inputs: StepInputs, shape: GraphShape, device: torch.device) -> torch.Tensor:
    """A step in the place of the idle one that a graph was recorded with."""
    padded = pad(inputs, shape)
    data = torch.from_numpy(with_tiles(padded, context_tiles(padded, shape.tiles))).to(device)
    return logits_of(model, CudaBatch.of(data, idle(shape), shape.tiles))[: inputs.counts.logits]


def logits_of(model: CudaModel, batch: CudaBatch) -> torch.Tensor:
    logits = model.forward(batch, torch.zeros(9, dtype=torch.int64, device=batch.token_ids.device))
    assert logits is not None
    return logits.float().cpu()


@pytest.mark.parametrize("precision", [name if name in QUICK else slow(name) for name in PRECISIONS])
def test_logits_are_those_of_the_plain_model(
    hf_directory: Callable[..., Path], tmp_path: Path, device: torch.device, precision: str
) -> None:
    """Two requests, one prompt in chunks, mixed steps and padded ones. The reference computes in float32."""
    options, bound = PRECISIONS[precision]
    if options["dtype"] == "bfloat16" and device.type == "cpu":
        pytest.skip("the interpreter does not compute products in bfloat16")
    if precision in CARDS_ALONE and device.type == "cpu":
        pytest.skip("for cards alone, to keep the suite short")
    source = hf_directory(initializer_range=0.1, dtype=getattr(torch, options["dtype"]), **SHAPE)
    settings = CheckpointRecipe(**options)
    if settings.calibrated:
        write_ranges(calibrate(HfModel(source), [list(range(60))]), tmp_path / "ranges.safetensors")
        settings = CheckpointRecipe(**options, act_ranges=str(tmp_path / "ranges.safetensors"))
    run_conversion(plan_conversion(source, settings), tmp_path / "out")
    config = read_checkpoint_config(tmp_path / "out")
    tensors = dict(read_rank(tmp_path / "out", 0))
    layout = None if settings.int8_layout == "plain" else settings.int8_layout
    dtype = getattr(torch, options["dtype"])
    cuda = CudaModel(
        config,
        tensors,
        SingleRank(),
        int8_layout=layout,
        dtype=dtype,
        device=device,
        max_batch_size=4,
        max_seq_len=64,
    )
    int8_kv = settings.kv_cache == "int8"
    cuda.allocate_cache(BLOCKS, TOKENS_PER_BLOCK, torch.int8 if int8_kv else dtype)
    plain = Qwen2Model(
        config, tensors, SingleRank(), PlainAttention(), int8_layout=layout, dtype=torch.float32,
        device=torch.device("cpu"), num_blocks=BLOCKS, tokens_per_block=TOKENS_PER_BLOCK,
    )  # fmt: skip
    scheduler = Scheduler(SchedulerConfig(4, 24, 64, TOKENS_PER_BLOCK, BLOCKS, config.vocab_size))
    for index, length in enumerate((5, 21)):
        prompt = tuple(range(3 + index, 3 + index + length))
        scheduler.add(Request(id=str(index), input_token_ids=prompt, max_tokens=3))
    steps = 0
    while not scheduler.idle:
        step = scheduler.schedule()
        assert step is not None
        inputs = pack(step, TOKENS_PER_BLOCK)
        expected = plain.forward(AttentionBatch(inputs, torch.device("cpu")))
        assert expected is not None
        shape = next(shape for shape in SHAPES if shape.fits(inputs.counts))
        for got in (run(cuda, inputs, device), replay(cuda, inputs, shape, device)):
            assert got.shape == expected.shape
            assert not len(got) or ((got - expected).norm() / expected.norm()) < bound
        names = [chunk.request_id for chunk in step.chunks if chunk.samples]
        scheduler.update(step, dict(zip(names, expected.argmax(-1).tolist(), strict=True)))
        steps += 1
    assert steps == 4


@pytest.mark.parametrize("layout", ["sm80", "sm90"])
def test_weight_only_layouts_are_read_on_the_device(device: torch.device, layout: Any) -> None:
    codes = np.random.default_rng(1).integers(-128, 128, (64, 128)).astype(np.int8)
    stored = torch.from_numpy(to_layout(codes, layout)).to(device)
    assert torch.equal(from_layout(stored, layout).cpu(), torch.from_numpy(codes))


@pytest.mark.parametrize("scale", [1.0, 1e-36])
def test_weights_are_quantized_on_the_device_as_on_the_host(device: torch.device, scale: float) -> None:
    weight = np.random.default_rng(2).normal(size=(50, 64)).astype(np.float32) * np.float32(scale)
    weight[3] = 0
    codes, steps = quantize(weight)
    got, got_steps = quantize_weights(torch.from_numpy(weight).to(device), (weight,))
    assert torch.equal(got.cpu(), torch.from_numpy(codes))
    assert torch.equal(got_steps.cpu(), torch.from_numpy(steps))

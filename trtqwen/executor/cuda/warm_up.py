"""Warm a rank up: compile its kernels, and run every kind of step once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trtqwen.engine.config import EngineConfig
from trtqwen.executor.choose import Choice
from trtqwen.executor.cuda.kernels.ahead import compile_ahead
from trtqwen.executor.cuda.kernels.choose import choose_fused
from trtqwen.executor.cuda.kernels.penalize import penalize_fused
from trtqwen.executor.cuda.model import CudaModel
from trtqwen.executor.cuda.runner import CudaRunner
from trtqwen.executor.cuda.shapes import graph_shapes, idle
from trtqwen.executor.inputs import Counts, StepInputs
from trtqwen.executor.sampling import Sampler

_LENGTHS = (2, 30, 100, 300, 450, 1000)  # tokens of steps that together use every kernel


def compile_kernels(runner: CudaRunner, model: CudaModel, engine: EngineConfig, device: torch.device) -> int:
    """Compile the kernels of `measure_steps`, several at a time, and return their number.

    The KV cache must have at least one block.
    """

    def choose_first(logits: Tensor, choice: Choice) -> Tensor:
        # The penalties use tokens as indices, and a kernel that is not launched chooses none.
        return choose_fused(logits, choice).zero_()

    stand_in = Sampler(1, device, choose_first, penalize_fused)
    with model.shortened():
        return compile_ahead(lambda: _run_all(runner, engine, stand_in), device)


def measure_steps(runner: CudaRunner, engine: EngineConfig, device: torch.device, sampler: Sampler) -> int:
    """Run every kind of step, and return the memory of the largest one in bytes. Frees the memory again."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _run_all(runner, engine, sampler)
    torch.cuda.synchronize(device)
    need = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return need


def _run_all(runner: CudaRunner, engine: EngineConfig, sampler: Sampler) -> None:
    for inputs in _steps(engine):
        logits = runner.launch(inputs, sampler.last_tokens)
    if logits is not None:
        sampler.warm_up(logits[:1])


def _steps(engine: EngineConfig) -> Iterator[StepInputs]:
    """The largest step of prompts, shorter ones, and every shape that becomes a CUDA graph."""
    build = engine.build_config
    largest = min(build.max_seq_len, build.max_num_tokens)
    sequences = min(build.max_batch_size, max(1, build.max_num_tokens // largest))
    yield _prompts(sequences, largest, 0, build.tokens_per_block)
    for length in _LENGTHS:
        for past in (0, build.tokens_per_block):
            if length + past <= largest:
                yield _prompts(1, length, past, build.tokens_per_block)
    for shape in graph_shapes(build.max_batch_size, build.max_num_tokens):
        yield idle(shape)


def _prompts(sequences: int, length: int, past: int, tokens_per_block: int) -> StepInputs:
    """Return chunks of prompts with `past` tokens before them. They read block 0 and write nothing."""
    blocks = -(-(past + length) // tokens_per_block)
    counts = Counts(sequences * length, sequences, sequences if length == 1 else 0, sequences, sequences * blocks)
    inputs = StepInputs(counts, np.zeros(counts.total, np.int32))
    inputs.positions[:] = np.tile(past + np.arange(length), sequences)
    inputs.kv_slots[:] = -1
    inputs.query_begins[:] = np.arange(sequences + 1) * length
    inputs.context_lengths[:] = past + length
    inputs.block_begins[:] = np.arange(sequences + 1) * blocks
    inputs.logit_rows[:] = inputs.query_begins[1:] - 1
    return inputs

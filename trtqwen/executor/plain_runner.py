"""Steps without CUDA graphs: the plain reference, the CPU, and CUDA without the Triton language."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from trtqwen.artifact.names import rank_weights
from trtqwen.checkpoint.reader import read_rank
from trtqwen.engine.config import EngineConfig
from trtqwen.executor.attention import AttentionBackend, AttentionBatch, PlainAttention
from trtqwen.executor.config import WorkerConfig, kv_cache_blocks
from trtqwen.executor.device import DeviceChoice
from trtqwen.executor.inputs import StepInputs
from trtqwen.executor.loop import Runner
from trtqwen.executor.model import Qwen2Model
from trtqwen.executor.parallel import Communicator
from trtqwen.executor.sampling import Sampler

# Products of a layer. Below it, other cores are left to the gateway and Triton: the bundled model's steps of 1, 16
# and 64 tokens take 3.5, 6.0 and 14.8 ms on one thread and 2.7, 4.5 and 10.0 on two, but on a host with two cores 64
# streams over HTTP get 2,671 tokens/s with one thread and 2,375 with two.
_WORTH_THREADS = 64_000_000
# Weights of a layer that caches do not keep for the next step: one thread does not read memory at its full speed.
_BEYOND_CACHES = 4_000_000
_LARGE_BYTES = 1 << 27  # of a rank file: below it, float32 costs little, and answers are those of the reference


@dataclass(frozen=True)
class Started:
    """A rank that is ready to compute.

    Attributes:
        num_blocks: KV cache blocks that its memory holds.
        sampler: chooses tokens on its device; other ranks than 0 keep the last tokens in it.
    """

    runner: Runner
    num_blocks: int
    sampler: Sampler


class PlainRunner:
    """Runs one step after the other.

    Args:
        layer_values: weights in the linear layers of one layer on this rank; they determine the work of a step.
    """

    def __init__(self, model: Qwen2Model, device: torch.device, layer_values: int) -> None:
        self._model = model
        self._device = device
        self._layer_values = layer_values
        self._threads = torch.get_num_threads()

    def launch(self, inputs: StepInputs, sampled: Tensor) -> Tensor | None:
        """Compute a step; see `loop.Runner`."""
        cached = self._layer_values < _BEYOND_CACHES
        small = cached and inputs.counts.tokens * self._layer_values < _WORTH_THREADS
        torch.set_num_threads(1 if small else self._threads)
        return self._model.forward(AttentionBatch(inputs, self._device, sampled))


def make_runner(
    config: WorkerConfig, engine: EngineConfig, choice: DeviceChoice, communicator: Communicator
) -> Started:
    """Load a rank's share of the model."""
    choice = _with_precision(choice, config, engine, communicator)
    print(f"rank {config.rank} computes on {choice}", file=sys.stderr)
    num_blocks = kv_cache_blocks(engine, config.executor)
    attention, make_sampler = _kernels(choice, config.rank)
    model = Qwen2Model(
        engine.pretrained_config,
        dict(read_rank(config.engine, config.rank)),
        communicator,
        attention,
        int8_layout=engine.int8_layout,
        dtype=choice.dtype,
        device=choice.device,
        num_blocks=num_blocks,
        tokens_per_block=engine.build_config.tokens_per_block,
        plain=choice.kernels == "plain",
    )
    sampler = make_sampler(engine.build_config.max_batch_size, choice.device)
    return Started(PlainRunner(model, choice.device, engine.pretrained_config.layer_values), num_blocks, sampler)


def _with_precision(
    choice: DeviceChoice, config: WorkerConfig, engine: EngineConfig, communicator: Communicator
) -> DeviceChoice:
    """A large bfloat16 checkpoint stays in 16 bits where the CPU multiplies them faster: rank 0 tries it for all.

    float16 becomes float32: its range overflows without float32 sums, and the attention kernel does not read it.
    """
    dtype = torch.bfloat16
    size = (config.engine / rank_weights(0)).stat().st_size
    wanted = engine.pretrained_config.dtype == "bfloat16" and size >= _LARGE_BYTES
    if choice.device.type != "cpu" or choice.kernels == "plain" or not wanted:
        return choice
    told = None
    if config.rank == 0:
        from trtqwen.executor.cpu.precision import try_precision

        trial = try_precision(dtype, packed=torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        print(trial, file=sys.stderr)
        told = bytes([trial.pays])
    pays = communicator.broadcast(told) == b"\x01"
    return replace(choice, dtype=dtype, kv_dtype=dtype) if pays else choice


def _kernels(choice: DeviceChoice, rank: int) -> tuple[AttentionBackend, Callable[[int, torch.device], Sampler]]:
    """Attention and what makes the sampler: compiled ones where Numba is installed."""
    if choice.attention != "cpu":
        return PlainAttention(), Sampler
    from trtqwen.executor.attention.cpu import CpuAttention
    from trtqwen.executor.cpu.choose import choose_compiled, compile_sampling, penalize_compiled

    if rank == 0:  # the others choose no tokens
        compile_sampling()
    return CpuAttention(), partial(Sampler, chooser=choose_compiled, penalizer=penalize_compiled)

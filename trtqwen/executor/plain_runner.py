"""Steps computed as they come: the plain reference, the CPU, and CUDA without the Triton language."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """Runs each step as it comes."""

    def __init__(self, model: Qwen2Model, device: torch.device) -> None:
        self._model = model
        self._device = device

    def launch(self, inputs: StepInputs, sampled: Tensor) -> Tensor | None:
        """Compute a step; see `loop.Runner`."""
        return self._model.forward(AttentionBatch(inputs, self._device, sampled))


def make_runner(
    config: WorkerConfig, engine: EngineConfig, choice: DeviceChoice, communicator: Communicator
) -> Started:
    """Load a rank's share of the model."""
    num_blocks = kv_cache_blocks(engine, config.executor)
    model = Qwen2Model(
        engine.pretrained_config,
        dict(read_rank(config.engine, config.rank)),
        communicator,
        _attention(choice),
        int8_layout=engine.int8_layout,
        dtype=choice.dtype,
        device=choice.device,
        num_blocks=num_blocks,
        tokens_per_block=engine.build_config.tokens_per_block,
        plain=choice.kernels == "plain",
    )
    sampler = Sampler(engine.build_config.max_batch_size, choice.device)
    return Started(PlainRunner(model, choice.device), num_blocks, sampler)


def _attention(choice: DeviceChoice) -> AttentionBackend:
    if choice.attention != "cpu":
        return PlainAttention()
    from trtqwen.executor.attention.cpu import CpuAttention  # imports Numba

    return CpuAttention()

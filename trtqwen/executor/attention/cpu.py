"""Attention on the CPU: a kernel that reads the KV cache's blocks in place."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trtqwen.executor.attention.base import AttentionBatch
from trtqwen.executor.cpu.attention import paged_attention, store

_TILE = 32  # query vectors that go over a block of keys together


class CpuAttention:
    """Online softmax over tiles of query rows, in float32, for context and generation alike."""

    def __init__(self) -> None:
        self._planned: tuple[AttentionBatch, int, _Plan] | None = None

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> None:
        store(_bits(key.contiguous()), _bits(value.contiguous()), batch.inputs.kv_slots, _bits(keys), _bits(values))

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        group = query.shape[1] // keys.shape[1]
        plan = self._plan(batch, group)
        output = torch.empty(query.shape, dtype=torch.float32)
        paged_attention(
            query.float().contiguous().numpy(),
            _bits(keys),
            _bits(values),
            plan.tiles,
            plan.block_ids,
            plan.block_begins,
            np.float32(query.shape[-1] ** -0.5),
            output.numpy(),
        )
        return output.to(query.dtype)

    def _plan(self, batch: AttentionBatch, group: int) -> _Plan:
        """Return the plan of a step, which all its layers share."""
        if self._planned is None or self._planned[:2] != (batch, group):
            numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
            self._planned = (batch, group, _Plan(batch, max(1, _TILE // group)))
        return self._planned[2]


class _Plan:
    """A step cut into tiles.

    Attributes:
        tiles: int64 [tiles, 4], as `paged_attention` takes them.
        block_ids, block_begins: those of `StepInputs`.
    """

    def __init__(self, batch: AttentionBatch, rows: int) -> None:
        inputs = batch.inputs
        ends = inputs.query_begins[1:]
        lengths = np.diff(inputs.query_begins)
        tiles = -(-lengths // rows)
        sequence = np.repeat(np.arange(len(lengths)), tiles)
        number = np.arange(len(sequence)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        begin = inputs.query_begins[sequence] + number * rows
        left = ends[sequence] - begin
        position = inputs.context_lengths[sequence] - left
        self.tiles = np.stack([sequence, begin, np.minimum(rows, left), position], axis=1).astype(np.int64)
        self.block_ids = inputs.block_ids
        self.block_begins = inputs.block_begins


def _bits(cache: Tensor) -> npt.NDArray[np.generic]:
    """Return a cache as a numpy array; bfloat16 becomes uint16, because numpy has no bfloat16."""
    return cache.view(torch.int16).numpy().view(np.uint16) if cache.dtype == torch.bfloat16 else cache.numpy()

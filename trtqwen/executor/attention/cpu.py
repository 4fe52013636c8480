"""Attention on the CPU: a kernel that reads the KV cache's blocks where they lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trtqwen.executor.attention.base import AttentionBatch
from trtqwen.executor.cpu.attention import paged_attention

_TILE = 32  # query vectors that go over a block of keys together


class CpuAttention:
    """Online softmax over tiles of query rows, in float32, for context and generation alike."""

    def __init__(self) -> None:
        self._planned: tuple[AttentionBatch, int, _Plan] | None = None

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
        """The same for every layer of a step."""
        if self._planned is None or self._planned[:2] != (batch, group):
            self._planned = (batch, group, _Plan(batch, max(1, _TILE // group)))
        return self._planned[2]


class _Plan:
    """A step cut into tiles.

    Attributes:
        tiles: int64 [tiles, 4], as `paged_attention` takes them.
        block_ids: the blocks of all sequences, one behind the other.
        block_begins: where each sequence's begin.
    """

    def __init__(self, batch: AttentionBatch, rows: int) -> None:
        spans = batch.spans
        self.tiles = np.array(
            [
                (index, row, min(rows, span.end - row), span.context_length - span.end + row)
                for index, span in enumerate(spans)
                for row in range(span.begin, span.end, rows)
            ],
            np.int64,
        )
        self.block_ids: npt.NDArray[np.int64] = torch.cat([span.block_ids for span in spans]).numpy()
        self.block_begins = np.cumsum([0, *(len(span.block_ids) for span in spans)])


def _bits(cache: Tensor) -> npt.NDArray[np.generic]:
    """A cache as numpy sees it: numpy has no bfloat16."""
    return (cache.view(torch.uint16) if cache.dtype == torch.bfloat16 else cache).numpy()

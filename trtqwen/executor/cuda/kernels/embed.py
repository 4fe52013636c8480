"""The embedding of packed tokens, some of which only the device knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import begin, chained


@triton.jit
def _embed(token_ids, sampled, table, out, first, rows, width, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    begin(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids + token).to(tl.int64)
    if token_id < 0:
        token_id = tl.load(sampled + (-1 - token_id))
    local = token_id - first
    mine = tl.where((local >= 0) & (local < rows), width, 0)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        values = tl.load(table + local * width + columns, mask=columns < mine, other=0.0)
        tl.store(out + token * width + columns, values, mask=inside)


def embed(token_ids: Tensor, sampled: Tensor, table: Tensor, first: int) -> Tensor:
    """`table[token_ids - first]`, zeros for ids of other ranks.

    Args:
        token_ids: int32 [tokens]; -1 - slot stands for `sampled[slot]`.
        sampled: int64 [slots + 1].
        table: [rows, width], of the ids from `first` on.
    """
    rows, width = table.shape
    out = torch.empty((len(token_ids), width), dtype=table.dtype, device=table.device)
    _embed[(len(token_ids),)](
        token_ids, sampled, table, out, first, rows, width, BLOCK=1024, num_warps=4, **chained(len(token_ids))
    )
    return out

"""`penalties.penalize` as one kernel: a pass over logits and tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.penalties import LARGEST

_LARGEST = tl.constexpr(LARGEST)
_BLOCK = 4096


@triton.jit(do_not_specialize=["rows"])
def _penalize(logits, table, slots, values, out, rows, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    repetition, presence = tl.load(values + row), tl.load(values + rows + row)
    frequency = tl.load(values + 2 * rows + row)
    place = row.to(tl.int64) * vocab_size + token
    before = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    after = before
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        seen = tl.load(table + tl.load(slots + row) * vocab_size + token, mask=inside, other=0)
        repeated = tl.where(before > 0, before / repetition, before * repetition)
        count = seen >> 1
        charge = tl.where(count > 0, presence + frequency * count.to(tl.float32), 0.0)
        after = tl.where(seen > 0, repeated, before) - charge
        after = tl.where((after > _LARGEST) & (before <= _LARGEST), _LARGEST, after)
    tl.store(out + place, after, mask=inside)


def penalize_fused(logits: Tensor, table: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """See `penalties.penalize`.

    Args:
        logits: [rows, vocab_size] of any floating dtype, contiguous.
    """
    rows, vocab_size = logits.shape
    logits = logits.contiguous()
    out = torch.empty((rows, vocab_size), dtype=torch.float32, device=logits.device)
    grid = (rows, triton.cdiv(vocab_size, _BLOCK))
    # A fused multiply-add has no product that overflows, where the plain operators do.
    options = {"num_warps": 8, "enable_fp_fusion": False}
    _penalize[grid](logits, table, slots, values, out, rows, vocab_size, BLOCK=_BLOCK, **options)
    return out

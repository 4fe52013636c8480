"""Storage of keys and values in the paged KV cache."""

from __future__ import annotations

import triton
import triton.language as tl

from trtqwen.executor.cuda.kernels.quantize import round_to_int8


@triton.jit
def place_of_slot(slot, head, KV_HEADS: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr):
    """The row of a head in a cache [blocks, kv_heads, tokens_per_block, head_size], seen as a matrix."""
    return ((slot // TOKENS_PER_BLOCK) * KV_HEADS + head) * TOKENS_PER_BLOCK + slot % TOKENS_PER_BLOCK


@triton.jit
def store(place, values, exists, to_int, INT8: tl.constexpr):
    """Store values in a cache; an INT8 one gets round(values * to_int)."""
    if INT8:
        values = round_to_int8(values.to(tl.float32) * to_int)
    tl.store(place, values, mask=exists)

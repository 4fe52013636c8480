"""Rotary embedding of queries and keys, and storage of keys and values in the KV cache, in one pass per token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import begin, chained
from trtqwen.executor.cuda.kernels.kv_store import place_of_slot, store


@triton.jit
def _rotate(row, head, half, exists, cos, sin, HALF: tl.constexpr):
    place = row + head[:, None] * 2 * HALF + half[None, :]
    first = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=exists, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize=["first_token"])
def _rotary_store(
    qkv,
    table,
    positions,
    slots,
    keys,
    values,
    to_int,
    first_token,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    INT8: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin(CHAINED)
    token = first_token + tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF)
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(table + position * 2 * HALF + half)[None, :]
    sin = tl.load(table + position * 2 * HALF + HALF + half)[None, :]
    row = qkv + token * (HEADS + 2 * KV_HEADS) * 2 * HALF
    head = tl.arange(0, HEADS_PADDED)
    exists = (head < HEADS)[:, None]
    first, second = _rotate(row, head, half, exists, cos, sin, HALF)
    place = row + head[:, None] * 2 * HALF + half[None, :]
    tl.store(place, first.to(qkv.dtype.element_ty), mask=exists)
    tl.store(place + HALF, second.to(qkv.dtype.element_ty), mask=exists)

    slot = tl.load(slots + token).to(tl.int64)
    head = tl.arange(0, KV_PADDED)
    exists = (head < KV_HEADS)[:, None]
    stored = exists & (slot >= 0)
    base = place_of_slot(slot, head, KV_HEADS, TOKENS_PER_BLOCK)
    target = base[:, None] * 2 * HALF + half[None, :]
    kind: tl.constexpr = qkv.dtype.element_ty
    row += HEADS * 2 * HALF
    first, second = _rotate(row, head, half, exists, cos, sin, HALF)
    first, second = first.to(kind), second.to(kind)
    place = row + head[:, None] * 2 * HALF + half[None, :]
    tl.store(place, first, mask=exists)
    tl.store(place + HALF, second, mask=exists)
    place += KV_HEADS * 2 * HALF
    left = tl.load(place, mask=stored, other=0.0)
    right = tl.load(place + HALF, mask=stored, other=0.0)
    store(keys + target, first, stored, to_int, INT8)
    store(keys + target + HALF, second, stored, to_int, INT8)
    store(values + target, left, stored, to_int, INT8)
    store(values + target + HALF, right, stored, to_int, INT8)


def rotary_store(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    kv_step: float | None,
    *,
    first_token: int = 0,
) -> None:
    """Rotate the queries and keys of packed `qkv` in place, and store rotated keys and values in the cache slots.

    Formula: `nn.rotary.rotate`. An INT8 cache gets round(x / kv_step).

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * head_size].
        table: float32 [positions, 2, head_size / 2], cosines and sines.
        positions, slots: int32 [tokens]; a slot of -1 stores nothing.
        keys, values: [blocks, kv_heads, tokens_per_block, head_size].
        first_token: of the tokens to rotate and store; those before it stay as they are.
    """
    _, kv_heads, tokens_per_block, head_size = keys.shape
    heads = qkv.shape[1] // head_size - 2 * kv_heads
    tokens = len(qkv) - first_token
    _rotary_store[(tokens,)](
        qkv,
        table,
        positions,
        slots,
        keys,
        values,
        1.0 if kv_step is None else 1.0 / kv_step,
        first_token,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_size // 2,
        TOKENS_PER_BLOCK=tokens_per_block,
        HEADS_PADDED=triton.next_power_of_2(heads),
        KV_PADDED=triton.next_power_of_2(kv_heads),
        INT8=kv_step is not None,
        num_warps=4,
        **chained(tokens),
    )

"""Attention of one query for each sequence over the paged KV cache, the context split over several programs.

Rotary embedding and the storage of the new key and value are part of it. The last program of a query to finish joins
the parts: no second launch, and the grid depends on the batch size alone, as a CUDA graph needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import begin, chained
from trtqwen.executor.cuda.kernels.kv_store import place_of_slot, store

_LOG2_E = 1.4426950408889634
_PROGRAMS = 512  # enough to fill the card
MOST_SPLITS = 32


@triton.jit
def _rotate(head, dim, cos, sin, exists, HEAD_SIZE: tl.constexpr):
    """`nn.rotary.rotate` of the heads at `head`, in float32; `sin` is negative in the first half."""
    own = tl.load(head + dim, mask=exists, other=0.0).to(tl.float32)
    other = tl.load(head + (dim + HEAD_SIZE // 2) % HEAD_SIZE, mask=exists, other=0.0).to(tl.float32)
    return own * cos + other * sin


@triton.jit
def _decode(
    qkv,
    table,
    slots,
    keys,
    values,
    block_ids,
    block_begins,
    lengths,
    out,
    parts,
    weights,
    arrivals,
    scale,
    kv_step,
    to_int,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin(CHAINED)
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    first = split * share
    end = min(first + share, length)
    if first >= end:
        return
    kind: tl.constexpr = qkv.dtype.element_ty
    half: tl.constexpr = HEAD_SIZE // 2
    dim = tl.arange(0, HEAD_SIZE)
    member = tl.arange(0, GROUP)
    of_head: tl.constexpr = HEADS // KV_HEADS
    head = kv_head * of_head + member
    exists = (member < of_head)[:, None]
    turn = table + (length - 1).to(tl.int64) * HEAD_SIZE + dim % half
    cos, sin = tl.load(turn), tl.load(turn + half)
    sin = tl.where(dim < half, -sin, sin)
    row = qkv + sequence.to(tl.int64) * (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    q = _rotate(row + head[:, None] * HEAD_SIZE, dim[None, :], cos[None, :], sin[None, :], exists, HEAD_SIZE).to(kind)
    if end == length:
        slot = tl.load(slots + sequence).to(tl.int64)
        if slot >= 0:
            place = place_of_slot(slot, kv_head, KV_HEADS, TOKENS_PER_BLOCK) * HEAD_SIZE + dim
            every = dim < HEAD_SIZE
            row += (HEADS + kv_head) * HEAD_SIZE
            key = _rotate(row, dim, cos, sin, every, HEAD_SIZE).to(kind)
            store(keys + place, key, every, to_int, INT8)
            store(values + place, tl.load(row + KV_HEADS * HEAD_SIZE + dim), every, to_int, INT8)
        tl.debug_barrier()  # the loop reads what other threads of this program stored
    blocks = block_ids + tl.load(block_begins + sequence)
    offsets = tl.arange(0, BLOCK)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    sums = tl.zeros((GROUP, HEAD_SIZE), tl.float32)
    for start in range(first, end, BLOCK):
        position = start + offsets
        inside = position < end
        block = tl.load(blocks + position // TOKENS_PER_BLOCK, mask=inside, other=0).to(tl.int64)
        place = ((block * KV_HEADS + kv_head) * TOKENS_PER_BLOCK + position % TOKENS_PER_BLOCK) * HEAD_SIZE
        key = tl.load(keys + place[:, None] + dim[None, :], mask=inside[:, None], other=0.0).to(kind)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        odds = tl.exp2(scores - highest[:, None])
        faded = tl.exp2(largest - highest)
        total = total * faded + tl.sum(odds, axis=1)
        value = tl.load(values + place[:, None] + dim[None, :], mask=inside[:, None], other=0.0).to(kind)
        sums = tl.dot(odds.to(kind), value, sums * faded[:, None], input_precision=PRECISION)
        largest = highest
    target = out + (sequence.to(tl.int64) * HEADS + head[:, None]) * HEAD_SIZE + dim[None, :]
    if SPLITS == 1:
        tl.store(target, (sums / total[:, None] * kv_step).to(kind), mask=exists)
    else:
        slot = (sequence * KV_HEADS + kv_head).to(tl.int64) * SPLITS
        place = parts + ((slot + split) * GROUP + member[:, None]) * HEAD_SIZE + dim[None, :]
        tl.store(place, sums, mask=exists)
        tl.store(weights + ((slot + split) * 2) * GROUP + member, largest)
        tl.store(weights + ((slot + split) * 2 + 1) * GROUP + member, total)
        used = tl.cdiv(length, share)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + sequence * KV_HEADS + kv_head, 1, sem="acq_rel")
        if arrived == used - 1:
            tl.store(arrivals + sequence * KV_HEADS + kv_head, 0)
            largest = tl.full((GROUP,), float("-inf"), tl.float32)
            total = tl.zeros((GROUP,), tl.float32)
            sums = tl.zeros((GROUP, HEAD_SIZE), tl.float32)
            for part in range(0, used):
                of_part = tl.load(weights + ((slot + part) * 2) * GROUP + member, cache_modifier=".cg")
                weight = tl.load(weights + ((slot + part) * 2 + 1) * GROUP + member, cache_modifier=".cg")
                place = parts + ((slot + part) * GROUP + member[:, None]) * HEAD_SIZE + dim[None, :]
                more = tl.load(place, mask=exists, other=0.0, cache_modifier=".cg")
                highest = tl.maximum(largest, of_part)
                old, new = tl.exp2(largest - highest), tl.exp2(of_part - highest)
                total = total * old + weight * new
                sums = sums * old[:, None] + more * new[:, None]
                largest = highest
            tl.store(target, (sums / total[:, None] * kv_step).to(kind), mask=exists)


def num_splits(sequences: int, kv_heads: int, longest: int, block: int) -> int:
    """Programs that share a sequence's context: enough to fill the card, none with less than one block."""
    if sequences * kv_heads >= _PROGRAMS // 2:
        return 1
    wanted = max(1, min(MOST_SPLITS, _PROGRAMS // (sequences * kv_heads), longest // block))
    return int(triton.next_power_of_2(wanted + 1) // 2)


class DecodeWorkspace:
    """Memory for partial results of programs, for at most `sequences` queries. The kernel zeroes `arrivals` again."""

    def __init__(self, sequences: int, heads: int, kv_heads: int, head_size: int, device: torch.device) -> None:
        group = _group(heads, kv_heads)
        slots = max(_PROGRAMS, sequences * kv_heads)
        self.parts = torch.empty(slots * group * head_size, dtype=torch.float32, device=device)
        self.weights = torch.empty(slots * 2 * group, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(sequences * kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    qkv: Tensor,
    table: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    block_ids: Tensor,
    block_begins: Tensor,
    lengths: Tensor,
    out: Tensor,
    workspace: DecodeWorkspace,
    *,
    longest: int,
    kv_step: float | None = None,
) -> None:
    """Store a key and a value for each sequence, rotated as `rotary_store` does; softmax(q k^T / sqrt(head_size)) v.

    Args:
        qkv: [sequences or more, (heads + 2 kv_heads) * head_size], packed; one query for each sequence.
        table: see `rotary_store`.
        slots: int32 [sequences], of the new keys and values; -1 stores nothing.
        keys, values: [blocks, kv_heads, tokens_per_block, head_size]; int8 ones are multiplied by `kv_step`.
        block_ids, block_begins: int32, each sequence's blocks.
        lengths: int32 [sequences], tokens of each context with the new one, which is its last; 0 computes nothing.
        out: [rows, heads * head_size].
        longest: of the contexts, at most; the split is chosen for it.
    """
    _, kv_heads, tokens_per_block, head_size = keys.shape
    heads, sequences = out.shape[1] // head_size, len(lengths)
    full = qkv.dtype == torch.float32
    block = 32 if full else 64
    splits = num_splits(sequences, kv_heads, longest, block)
    step = 1.0 if kv_step is None else kv_step
    _decode[(sequences, kv_heads, splits)](
        qkv,
        table,
        slots,
        keys,
        values,
        block_ids,
        block_begins,
        lengths,
        out,
        workspace.parts,
        workspace.weights,
        workspace.arrivals,
        head_size**-0.5 * _LOG2_E * step,
        step,
        1.0 / step,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=_group(heads, kv_heads),
        HEAD_SIZE=head_size,
        TOKENS_PER_BLOCK=tokens_per_block,
        SPLITS=splits,
        BLOCK=block,
        PRECISION="ieee" if full else "tf32",
        INT8=kv_step is not None,
        num_warps=4,
        num_stages=3 if full else 4,
        **chained(sequences),
    )


def _group(heads: int, kv_heads: int) -> int:
    return max(16, int(triton.next_power_of_2(heads // kv_heads)))

"""Sums over the cards of one host, through memory that each card maps of the others: faster than NCCL for few tokens.

One-shot: every card reads all values of all cards. Two-shot: every card sums a part, and reads the others' sums.
The sum is in float32 and in the order of the ranks, so that all cards get the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
PROGRAMS = 64  # all must run at once, as they wait for those of the other cards


@triton.jit
def _meet(signals, rank, epoch, WORLD: tl.constexpr):
    """Wait until this program is here on every GPU. What it wrote before is then visible to all GPUs."""
    tl.debug_barrier()
    program = tl.program_id(0)
    ranks = tl.arange(0, WORLD)
    theirs = tl.load(signals + ranks).to(tl.pointer_type(tl.int32)) + program * WORLD + rank
    tl.atomic_xchg(theirs, epoch, sem="release", scope="sys")
    ours = tl.load(signals + rank).to(tl.pointer_type(tl.int32)) + program * WORLD + ranks
    late = 1
    while late > 0:
        seen = tl.atomic_add(ours, 0, sem="acquire", scope="sys")
        late = tl.max(tl.where(seen - epoch < 0, 1, 0), axis=0)  # the difference is right when epochs wrap around
    tl.debug_barrier()


@triton.jit
def _memory(buffers, peer, values, half):
    """A card's half of its buffer, as a pointer to the type of `values`."""
    return tl.multiple_of(tl.load(buffers + peer).to(values.dtype), 16) + half


@triton.jit
def _sum(buffers, values, half, place, inside, WORLD: tl.constexpr, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), tl.float32)
    for peer in tl.static_range(WORLD):
        total += tl.load(_memory(buffers, peer, values, half) + place, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _all_reduce(
    values,
    buffers,
    signals,
    calls,
    count,
    room,
    rank,
    WORLD: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    offsets = tl.arange(0, BLOCK)
    tiles = tl.cdiv(count, BLOCK)
    # Calls use two halves alternately: a card that writes one knows from the call between that none still reads it.
    # Every program counts every call, so that all agree on the half, replayed or not.
    call = tl.load(calls + program)
    tl.store(calls + program, call + 1)
    half = (call % 2) * 2 * room
    if program < tiles:
        mine = _memory(buffers, rank, values, half)
        for tile in range(program, tiles, programs):
            place = tile * BLOCK + offsets
            tl.store(mine + place, tl.load(values + place, mask=place < count), mask=place < count)
        _meet(signals, rank, 2 * call + 1, WORLD)
        if TWO_SHOT:
            part = tl.arange(0, BLOCK // WORLD)
            for tile in range(program, tiles, programs):
                place = tile * BLOCK + rank * (BLOCK // WORLD) + part
                total = _sum(buffers, values, half, place, place < count, WORLD, BLOCK // WORLD)
                tl.store(mine + room + place, total.to(values.dtype.element_ty), mask=place < count)
            _meet(signals, rank, 2 * call + 2, WORLD)
            for tile in range(program, tiles, programs):
                for peer in tl.static_range(WORLD):
                    place = tile * BLOCK + peer * (BLOCK // WORLD) + part
                    sums = _memory(buffers, peer, values, half) + room
                    tl.store(values + place, tl.load(sums + place, mask=place < count), mask=place < count)
        else:
            for tile in range(program, tiles, programs):
                place = tile * BLOCK + offsets
                total = _sum(buffers, values, half, place, place < count, WORLD, BLOCK)
                tl.store(values + place, total.to(values.dtype.element_ty), mask=place < count)


def all_reduce(
    values: Tensor, buffers: Tensor, signals: Tensor, calls: Tensor, *, room: int, rank: int, two_shot: bool
) -> None:
    """Replace `values` by their sum over the cards. Every card makes the same calls in the same order.

    Args:
        values: contiguous, at most `room` elements.
        buffers: int64 [cards], where each card's buffer is: 4 * `room` elements of the type of `values`.
        signals: int64 [cards], where each card's signals are: int32 [PROGRAMS, cards], zeros before the first call.
        calls: int32 [PROGRAMS] of this card, zeros before the first call.
        rank: this card's place.
    """
    _all_reduce[(PROGRAMS,)](
        values,
        buffers,
        signals,
        calls,
        values.numel(),
        room,
        rank,
        WORLD=len(buffers),
        TWO_SHOT=two_shot,
        BLOCK=BLOCK,
        num_warps=8,
    )


def can_reduce(world_size: int) -> bool:
    """Whether the kernel works for this many cards: a power of two that divides a block."""
    return world_size > 1 and triton.next_power_of_2(world_size) == world_size <= torch.cuda.device_count()

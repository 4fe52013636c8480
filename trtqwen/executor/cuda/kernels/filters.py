"""Draws with top-k, top-p and min-p: a program for each row.

With top-k or top-p the program gathers the few tokens near the best one that can be kept, and sorts them. The highest
logits of groups of tokens, which another kernel has found, say how near: this program reads the whole row only once.
Where more than `_GATHERED` tokens can be kept, it finds the filters' threshold by bisection, sixty passes over the
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.choose import LEAST_TEMPERATURE, Choice

LEAST = tl.constexpr(LEAST_TEMPERATURE)
_LOWEST = tl.constexpr(-104.0)  # exp of anything below is 0 in float32
_BISECTIONS = tl.constexpr(30)
_NEAREST, _FARTHEST = tl.constexpr(0.25), tl.constexpr(64.0)  # distances from the best scaled logit that are tried
_TOO_MANY = tl.constexpr(1.0)
_COARSE_BISECTIONS = tl.constexpr(14)
_GATHERED = 1024  # tokens of a row at most
_ENOUGH = tl.constexpr(512)  # tokens that nearly always have the mass of top-p


@triton.jit
def load_logits(row, start, vocab_size, BLOCK: tl.constexpr):
    """`BLOCK` tokens from `start` on, and their logits in float32, -inf behind the end of the row."""
    token = start + tl.arange(0, BLOCK)
    return token, tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _scaled(row, start, vocab_size, best, temperature, BLOCK: tl.constexpr):
    _token, value = load_logits(row, start, vocab_size, BLOCK)
    return (value - best) / temperature


@triton.jit
def _count_and_mass(row, vocab_size, best, temperature, threshold, BLOCK: tl.constexpr):
    """Tokens whose scaled logits reach a threshold, and the sum of their exponentials."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        scaled = _scaled(row, start, vocab_size, best, temperature, BLOCK)
        kept = scaled >= threshold
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp(scaled), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _bisect(row, vocab_size, best, temperature, low, least_count, least_mass, BLOCK: tl.constexpr):
    """The largest threshold, at least `low`, that tokens of this count and this mass reach."""
    high = 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        count, mass = _count_and_mass(row, vocab_size, best, temperature, middle, BLOCK)
        enough = (count >= least_count) & (mass >= least_mass)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _filter(row, vocab_size, best, temperature, top_k, top_p, min_p, mass, BLOCK: tl.constexpr):
    """The largest threshold that keeps what top-k, then top-p, then min-p keep; found by bisection.

    Without top-k, top-p is a share of `mass`.
    """
    low = _LOWEST
    if top_k > 0:
        low = _bisect(row, vocab_size, best, temperature, low, top_k, 0.0, BLOCK)
        _count, mass = _count_and_mass(row, vocab_size, best, temperature, low, BLOCK)
    if (top_p > 0) & (top_p < 1):
        low = _bisect(row, vocab_size, best, temperature, low, 0, mass * top_p, BLOCK)
    return tl.maximum(low, tl.where(min_p > 0, tl.log(tl.maximum(min_p, 1e-37)), low))


@triton.jit
def has_filter(values, rows, program):
    """Whether a row has top-k, top-p or min-p; see `Choice.values`."""
    top_p = tl.load(values + rows + program)
    others = tl.maximum(tl.load(values + 2 * rows + program), tl.load(values + 4 * rows + program))
    return (top_p > 0) & (top_p < 1) | (others > 0)


@triton.jit
def _reach_of_count(highest, wanted):
    """A threshold that `wanted` tokens reach and few others do, from the highest scaled logits of groups.

    That many groups have a token above it, and few of them have more than one.
    """
    low, high = _LOWEST, 0.0
    for _ in range(_COARSE_BISECTIONS):
        middle = (low + high) / 2
        enough = tl.sum((highest >= middle).to(tl.int32), axis=0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _reach_of_mass(row, vocab_size, best, temperature, least_mass, GATHERED: tl.constexpr, BLOCK: tl.constexpr):
    """A threshold that tokens of this mass reach and few others do, or `_TOO_MANY`."""
    threshold = _TOO_MANY
    distance = _NEAREST
    while distance <= _FARTHEST:
        count, mass = _count_and_mass(row, vocab_size, best, temperature, -distance, BLOCK)
        if (mass >= least_mass) | (count > GATHERED):
            threshold = tl.where(count <= GATHERED, -distance, _TOO_MANY)
            distance = _FARTHEST
        distance *= 2
    return threshold


@triton.jit
def _gather(
    row, vocab_size, best, temperature, threshold, near, near_tokens, GATHERED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the scaled logits that reach a threshold, and their tokens, in the order of the tokens.

    Returns:
        The number of these tokens; those beyond `GATHERED` are not written.
    """
    lane = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, vocab_size, BLOCK):
        scaled = _scaled(row, start, vocab_size, best, temperature, BLOCK)
        kept = scaled >= threshold
        found = tl.sum(kept.to(tl.int32), axis=0)
        if found > 0:
            place = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            kept &= place < GATHERED
            tl.store(near + place, scaled, mask=kept)
            tl.store(near_tokens + place, start + lane, mask=kept)
            count += found
    tl.debug_barrier()  # all of the program reads what all of it has written
    return count


@triton.jit
def _draw_near(near, count, top_k, top_p, min_p, mass, uniform, GATHERED: tl.constexpr):
    """`_filter` and `_draw` on gathered tokens."""
    rank = tl.arange(0, GATHERED)
    scaled = tl.load(near + rank, mask=rank < count, other=float("-inf"))
    ordered = tl.sort(scaled, descending=True)
    threshold = _LOWEST
    if top_k > 0:
        threshold = tl.maximum(tl.max(tl.where(rank >= top_k - 1, ordered, float("-inf")), axis=0), threshold)
    odds = tl.where(ordered >= threshold, tl.exp(ordered), 0.0)
    if (top_p > 0) & (top_p < 1):
        whole = tl.where(top_k > 0, tl.sum(odds, axis=0), mass)
        before = tl.cumsum(odds, axis=0) - odds
        kept = tl.sum((before < whole * top_p).to(tl.int32), axis=0)
        least = tl.max(tl.where(rank >= tl.maximum(kept, 1) - 1, ordered, float("-inf")), axis=0)
        threshold = tl.maximum(threshold, least)
    if min_p > 0:
        threshold = tl.maximum(threshold, tl.log(tl.maximum(min_p, 1e-37)))
    odds = tl.where(scaled >= threshold, tl.exp(scaled), 0.0)
    reached = (tl.cumsum(odds, axis=0) > tl.sum(odds, axis=0) * uniform) & (odds > 0)
    return tl.min(tl.where(reached, rank, count), axis=0)


@triton.jit
def _draw(row, vocab_size, best, temperature, threshold, uniform, BLOCK: tl.constexpr):
    """Return the index of the token that the uniform number selects; `vocab_size` if rounding leaves none."""
    lane = tl.arange(0, BLOCK)
    _count, total = _count_and_mass(row, vocab_size, best, temperature, threshold, BLOCK)
    target = total * uniform
    chosen = vocab_size
    before = 0.0
    start = 0
    while start < vocab_size:
        scaled = _scaled(row, start, vocab_size, best, temperature, BLOCK)
        odds = tl.where(scaled >= threshold, tl.exp(scaled), 0.0)
        mass = tl.sum(odds, axis=0)
        if before + mass > target:
            reached = (before + tl.cumsum(odds, axis=0) > target) & (odds > 0)
            chosen = tl.min(tl.where(reached, start + lane, vocab_size), axis=0)
            start = tl.where(chosen < vocab_size, vocab_size, start)
        before += mass
        start += BLOCK
    return chosen


@triton.jit
def _has_mass(near, count, least_mass, GATHERED: tl.constexpr):
    """Whether gathered tokens have a mass."""
    rank = tl.arange(0, GATHERED)
    scaled = tl.load(near + rank, mask=rank < count, other=float("-inf"))
    return tl.sum(tl.exp(scaled), axis=0) >= least_mass


@triton.jit(do_not_specialize=["rows"])
def _draw_filtered(
    logits,
    values,
    summary,
    groups,
    near,
    near_tokens,
    out,
    rows,
    vocab_size,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = logits + program.to(tl.int64) * vocab_size
    temperature = tl.load(values + program)
    best, mass = tl.load(summary + 2 * program), tl.load(summary + 2 * program + 1)
    usable = (best > float("-inf")) & (best < float("inf"))
    if usable & (temperature > 0) & has_filter(values, rows, program):
        top_p, min_p = tl.load(values + rows + program), tl.load(values + 2 * rows + program)
        uniform = tl.load(values + 3 * rows + program)
        top_k = tl.load(values + 4 * rows + program)
        by_mass = (top_p > 0) & (top_p < 1)
        temperature = tl.maximum(temperature, LEAST)
        count = GATHERED + 1
        near += program * GATHERED
        near_tokens += program * GATHERED
        if by_mass | (top_k > 0):
            group = tl.arange(0, GROUPS_PADDED)
            highest = tl.load(groups + program * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
            reach = _reach_of_count((highest - best) / temperature, tl.where(top_k > 0, top_k, _ENOUGH))
            count = _gather(row, vocab_size, best, temperature, reach, near, near_tokens, GATHERED, BLOCK)
            if top_k <= 0:
                suits = (count <= GATHERED) & _has_mass(near, count, mass * top_p, GATHERED)
                if suits == 0:
                    reach = _reach_of_mass(row, vocab_size, best, temperature, mass * top_p, GATHERED, BLOCK)
                    count = GATHERED + 1
                    if reach < _TOO_MANY:
                        count = _gather(row, vocab_size, best, temperature, reach, near, near_tokens, GATHERED, BLOCK)
        if count <= GATHERED:
            place = _draw_near(near, count, top_k, top_p, min_p, mass, uniform, GATHERED)
            drawn = tl.load(near_tokens + place, mask=place < count, other=vocab_size)
        else:
            threshold = _filter(row, vocab_size, best, temperature, top_k, top_p, min_p, mass, BLOCK)
            drawn = _draw(row, vocab_size, best, temperature, threshold, uniform, BLOCK)
        if drawn < vocab_size:
            tl.store(out + program, drawn.to(tl.int64))


def draw_filtered(logits: Tensor, choice: Choice, summary: Tensor, groups: Tensor, tokens: Tensor) -> None:
    """Replace the tokens of the rows that have a filter.

    Args:
        logits: float32 [rows, vocab_size], contiguous: filters compile for seconds, so only for one dtype.
        summary: float32 [rows, 2], the highest logit and the sum of the exponentials of the scaled logits, relative
            to it. A row without a finite highest logit keeps its token.
        groups: float32 [rows, groups], the highest logit of each group of tokens.
        tokens: int64 [rows].
    """
    rows, vocab_size = logits.shape
    near = torch.empty((rows, _GATHERED), dtype=torch.float32, device=logits.device)
    near_tokens = torch.empty((rows, _GATHERED), dtype=torch.int32, device=logits.device)
    _draw_filtered[(rows,)](
        logits,
        choice.values,
        summary,
        groups,
        near,
        near_tokens,
        tokens,
        rows,
        vocab_size,
        GROUPS=groups.shape[1],
        GROUPS_PADDED=triton.next_power_of_2(groups.shape[1]),
        GATHERED=_GATHERED,
        BLOCK=8192,
        num_warps=16,
    )

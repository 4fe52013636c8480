"""`choose.choose` as one kernel: a program for each row reads its logits a few times and writes a token.

Filters are found by bisection, many passes over what may be kept. With top-k or top-p that is little: the program
gathers the tokens near the best one, whose place it finds in a few passes, and works on those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.choose import NONE_LEFT, NOT_FINITE, Choice

_NOT_FINITE, _NONE_LEFT = tl.constexpr(NOT_FINITE), tl.constexpr(NONE_LEFT)
_LOWEST = tl.constexpr(-104.0)  # exp of anything below is 0 in float32
_BISECTIONS = tl.constexpr(30)
_NEAREST, _FARTHEST = tl.constexpr(0.25), tl.constexpr(64.0)  # distances from the best scaled logit that are tried
_TOO_MANY = tl.constexpr(1.0)
_GATHERED = 2048  # tokens of a row at most


@triton.jit
def _scaled(row, start, vocab_size, best, temperature, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    values = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    return (values - best) / temperature


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
def _filter(row, vocab_size, best, temperature, top_k, top_p, min_p, mass, BLOCK: tl.constexpr):
    """The largest threshold that keeps what top-k, then top-p, then min-p keep; found by bisection.

    Without top-k, top-p is a share of `mass`.
    """
    low = _LOWEST
    if top_k > 0:
        high = 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            count, _mass = _count_and_mass(row, vocab_size, best, temperature, middle, BLOCK)
            enough = count >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        _count, mass = _count_and_mass(row, vocab_size, best, temperature, low, BLOCK)
    if (top_p > 0) & (top_p < 1):
        limit, high = mass * top_p, 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            _count, mass = _count_and_mass(row, vocab_size, best, temperature, middle, BLOCK)
            enough = mass >= limit
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return tl.maximum(low, tl.where(min_p > 0, tl.log(tl.maximum(min_p, 1e-37)), low))


@triton.jit
def _neighborhood(row, vocab_size, best, temperature, top_k, least_mass, GATHERED: tl.constexpr, BLOCK: tl.constexpr):
    """A threshold that every token kept by top-k or top-p reaches and few others do, or `_TOO_MANY`."""
    threshold = _TOO_MANY
    distance = _NEAREST
    while distance <= _FARTHEST:
        count, mass = _count_and_mass(row, vocab_size, best, temperature, -distance, BLOCK)
        if (count >= top_k) & (mass >= least_mass):
            threshold = tl.where(count <= GATHERED, -distance, _TOO_MANY)
            distance = _FARTHEST
        distance *= 4
    return threshold


@triton.jit
def _gather(row, vocab_size, best, temperature, threshold, near, near_tokens, BLOCK: tl.constexpr):
    """Write the scaled logits that reach a threshold, and their tokens, in the order of the tokens; their number."""
    lane = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, vocab_size, BLOCK):
        scaled = _scaled(row, start, vocab_size, best, temperature, BLOCK)
        kept = scaled >= threshold
        found = tl.sum(kept.to(tl.int32), axis=0)
        if found > 0:
            place = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(near + place, scaled, mask=kept)
            tl.store(near_tokens + place, start + lane, mask=kept)
            count += found
    tl.debug_barrier()  # all of the program reads what all of it has written
    return count


@triton.jit
def _draw(row, vocab_size, best, temperature, threshold, uniform, BLOCK: tl.constexpr):
    """The place of the token that the uniform number falls on; `vocab_size` where rounding leaves none."""
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


@triton.jit(do_not_specialize=["rows"])
def _choose(
    logits,
    values,
    near,
    near_tokens,
    out,
    rows,
    vocab_size,
    DRAWS: tl.constexpr,
    FILTERS: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = logits + program.to(tl.int64) * vocab_size
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        token = start + lane
        value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        broken |= (value != value).to(tl.int32)
        where = tl.where(value > highest, token, where)
        highest = tl.maximum(value, highest)
    best = tl.max(highest, axis=0)
    chosen = tl.min(tl.where(highest == best, where, vocab_size), axis=0)
    usable = (best > float("-inf")) & (best < float("inf")) & (tl.max(broken, axis=0) == 0)
    if DRAWS:
        temperature = tl.load(values + program)
        if usable & (temperature > 0):
            temperature = tl.maximum(temperature, 1e-20)
            uniform = tl.load(values + 3 * rows + program)
            threshold = _LOWEST
            drawn = vocab_size
            if FILTERS:
                top_p, min_p = tl.load(values + rows + program), tl.load(values + 2 * rows + program)
                top_k = tl.load(values + 4 * rows + program)
                by_mass = (top_p > 0) & (top_p < 1)
                mass = 0.0
                if by_mass & (top_k <= 0):
                    _count, mass = _count_and_mass(row, vocab_size, best, temperature, _LOWEST, BLOCK)
                neighborhood = _TOO_MANY
                if by_mass | (top_k > 0):
                    neighborhood = _neighborhood(
                        row, vocab_size, best, temperature, top_k, mass * top_p, GATHERED, BLOCK
                    )
                if neighborhood < _TOO_MANY:
                    mine, tokens = near + program * GATHERED, near_tokens + program * GATHERED
                    count = _gather(row, vocab_size, best, temperature, neighborhood, mine, tokens, BLOCK)
                    threshold = _filter(mine, count, 0.0, 1.0, top_k, top_p, min_p, mass, GATHERED)
                    place = _draw(mine, count, 0.0, 1.0, threshold, uniform, GATHERED)
                    drawn = tl.load(tokens + place, mask=place < count, other=vocab_size)
                else:
                    threshold = _filter(row, vocab_size, best, temperature, top_k, top_p, min_p, mass, BLOCK)
                    drawn = _draw(row, vocab_size, best, temperature, threshold, uniform, BLOCK)
            else:
                drawn = _draw(row, vocab_size, best, temperature, threshold, uniform, BLOCK)
            chosen = tl.where(drawn < vocab_size, drawn, chosen)
    if best == float("-inf"):
        chosen = _NONE_LEFT
    elif not usable:
        chosen = _NOT_FINITE
    if tl.max(broken, axis=0) != 0:
        chosen = _NOT_FINITE
    tl.store(out + program, chosen.to(tl.int64))


def choose_fused(logits: Tensor, choice: Choice) -> Tensor:
    """See `choose.choose`.

    Args:
        logits: [rows, vocab_size] of any floating dtype, contiguous.
    """
    rows, vocab_size = logits.shape
    logits = logits.contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    room = (rows, _GATHERED if choice.filters else 0)
    near = torch.empty(room, dtype=torch.float32, device=logits.device)
    near_tokens = torch.empty(room, dtype=torch.int32, device=logits.device)
    few = rows <= 64  # each has a processor for itself
    _choose[(rows,)](
        logits,
        choice.values,
        near,
        near_tokens,
        out,
        rows,
        vocab_size,
        DRAWS=choice.draws,
        FILTERS=choice.filters,
        GATHERED=_GATHERED,
        BLOCK=16384 if few else 4096,
        num_warps=16 if few else 8,
    )
    return out

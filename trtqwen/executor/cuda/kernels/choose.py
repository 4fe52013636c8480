"""`choose.choose` as one kernel: a program for each row reads its logits two or three times and writes a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.choose import NONE_LEFT, NOT_FINITE, Choice

_NOT_FINITE, _NONE_LEFT = tl.constexpr(NOT_FINITE), tl.constexpr(NONE_LEFT)
_LOWEST = tl.constexpr(-104.0)  # exp of anything below is 0 in float32
_BISECTIONS = tl.constexpr(30)


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
def _filter(row, vocab_size, best, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """The largest threshold that keeps what top-k, then top-p, then min-p keep; found by bisection."""
    low = _LOWEST
    if top_k > 0:
        high = 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            count, _mass = _count_and_mass(row, vocab_size, best, temperature, middle, BLOCK)
            enough = count >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    if (top_p > 0) & (top_p < 1):
        _count, mass = _count_and_mass(row, vocab_size, best, temperature, low, BLOCK)
        limit, high = mass * top_p, 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            _count, mass = _count_and_mass(row, vocab_size, best, temperature, middle, BLOCK)
            enough = mass >= limit
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return tl.maximum(low, tl.where(min_p > 0, tl.log(tl.maximum(min_p, 1e-37)), low))


@triton.jit(do_not_specialize=["rows"])
def _choose(logits, values, out, rows, vocab_size, DRAWS: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr):
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
            threshold = _LOWEST
            if FILTERS:
                top_p, min_p = tl.load(values + rows + program), tl.load(values + 2 * rows + program)
                top_k = tl.load(values + 4 * rows + program)
                threshold = _filter(row, vocab_size, best, temperature, top_k, top_p, min_p, BLOCK)
            total = 0.0
            for start in range(0, vocab_size, BLOCK):
                scaled = _scaled(row, start, vocab_size, best, temperature, BLOCK)
                total += tl.sum(tl.where(scaled >= threshold, tl.exp(scaled), 0.0), axis=0)
            target = total * tl.load(values + 3 * rows + program)
            before = 0.0
            start = 0
            while start < vocab_size:
                scaled = _scaled(row, start, vocab_size, best, temperature, BLOCK)
                odds = tl.where(scaled >= threshold, tl.exp(scaled), 0.0)
                mass = tl.sum(odds, axis=0)
                if before + mass > target:
                    reached = (before + tl.cumsum(odds, axis=0) > target) & (odds > 0)
                    found = tl.min(tl.where(reached, start + lane, vocab_size), axis=0)
                    chosen = tl.where(found < vocab_size, found, chosen)
                    start = vocab_size
                before += mass
                start += BLOCK
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
    few = rows <= 64  # each has a processor for itself
    _choose[(rows,)](
        logits,
        choice.values,
        out,
        rows,
        vocab_size,
        DRAWS=choice.draws,
        FILTERS=choice.filters,
        BLOCK=16384 if few else 4096,
        num_warps=16 if few else 8,
    )
    return out

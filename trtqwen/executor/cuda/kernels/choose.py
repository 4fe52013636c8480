"""`choose.choose` in two or three kernels. Each row is divided over programs, in the same parts for every batch size.

The first kernel finds the best token of each part and, for draws, its sum of exponentials. The second one joins the
parts, selects the part that the uniform number falls into, and reads that part again. Rows with filters get their
token from a third kernel, `filters.draw_filtered`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.choose import NONE_LEFT, NOT_FINITE, Choice
from trtqwen.executor.cuda.kernels.filters import LEAST, draw_filtered, has_filter, load_logits

_NOT_FINITE, _NONE_LEFT = tl.constexpr(NOT_FINITE), tl.constexpr(NONE_LEFT)
_PART = 8192  # logits of a program
_GROUP = 16  # of which filters want to know the highest


@triton.jit
def _summarize(
    logits,
    values,
    highest,
    mass,
    where,
    groups,
    vocab_size,
    DRAWS: tl.constexpr,
    FILTERS: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write each part's highest logit, NaN if one is not a number, its first token, and its mass relative to it."""
    program, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token, value = load_logits(logits + program.to(tl.int64) * vocab_size, part * PART, vocab_size, PART)
    place = program * parts + part
    broken = tl.max((value != value).to(tl.int32), axis=0) != 0
    best = tl.max(tl.where(value == value, value, float("-inf")), axis=0)
    tl.store(where + place, tl.min(tl.where(value == best, token, vocab_size), axis=0))
    tl.store(highest + place, tl.where(broken, float("nan"), best))
    if DRAWS:
        temperature = tl.maximum(tl.load(values + program), LEAST)
        odds = tl.where(value > float("-inf"), tl.exp((value - best) / temperature), 0.0)
        tl.store(mass + place, tl.sum(odds, axis=0))
    if FILTERS:
        group = place * (PART // GROUP) + tl.arange(0, PART // GROUP)
        tl.store(groups + group, tl.max(tl.reshape(value, (PART // GROUP, GROUP)), axis=1))


@triton.jit(do_not_specialize=["rows"])
def _pick(
    logits,
    values,
    highest,
    mass,
    where,
    summary,
    out,
    rows,
    vocab_size,
    DRAWS: tl.constexpr,
    FILTERS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    PART: tl.constexpr,
):
    program = tl.program_id(0)
    part = tl.arange(0, PARTS_PADDED)
    exists = part < PARTS
    best_of = tl.load(highest + program * PARTS + part, mask=exists, other=float("-inf"))
    broken = tl.max((best_of != best_of).to(tl.int32), axis=0) != 0
    best = tl.max(tl.where(best_of == best_of, best_of, float("-inf")), axis=0)
    first = tl.load(where + program * PARTS + part, mask=exists, other=vocab_size)
    chosen = tl.min(tl.where(best_of == best, first, vocab_size), axis=0)
    usable = (best > float("-inf")) & (best < float("inf")) & (broken == 0)
    if DRAWS:
        temperature = tl.load(values + program)
        total = 0.0
        if usable & (temperature > 0):
            temperature = tl.maximum(temperature, LEAST)
            share = tl.load(mass + program * PARTS + part, mask=exists, other=0.0)
            share = tl.where(best_of > float("-inf"), share * tl.exp((best_of - best) / temperature), 0.0)
            total = tl.sum(share, axis=0)
            target = total * tl.load(values + 3 * rows + program)
            before = tl.cumsum(share, axis=0) - share
            within = tl.min(tl.where((before + share > target) & (share > 0), part, PARTS), axis=0)
            if FILTERS:  # another kernel draws where there is a filter
                within = tl.where(has_filter(values, rows, program), PARTS, within)
            if within < PARTS:
                target -= tl.sum(tl.where(part == within, before, 0.0), axis=0)
                row = logits + program.to(tl.int64) * vocab_size
                token, value = load_logits(row, within * PART, vocab_size, PART)
                odds = tl.exp((value - best) / temperature)
                drawn = tl.min(tl.where((tl.cumsum(odds, axis=0) > target) & (odds > 0), token, vocab_size), axis=0)
                # Rounding can leave none: these sums are not those of the first kernel.
                last = tl.max(tl.where(odds > 0, token, 0), axis=0)
                chosen = tl.where(drawn < vocab_size, drawn, last)
        if FILTERS:
            tl.store(summary + 2 * program, tl.where(usable, best, float("nan")))
            tl.store(summary + 2 * program + 1, total)
    if not usable:
        chosen = tl.where((best == float("-inf")) & (broken == 0), _NONE_LEFT, _NOT_FINITE)
    tl.store(out + program, chosen.to(tl.int64))


def choose_fused(logits: Tensor, choice: Choice) -> Tensor:
    """See `choose.choose`.

    Args:
        logits: [rows, vocab_size] of any floating dtype, contiguous.
    """
    rows, vocab_size = logits.shape
    # The copy costs a hundredth of a step.
    logits = (logits.float() if choice.filters else logits).contiguous()
    parts = triton.cdiv(vocab_size, _PART)
    highest, mass = torch.empty((2, rows, parts), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    filtered = rows if choice.filters else 0
    groups = torch.empty((filtered, parts * _PART // _GROUP), dtype=torch.float32, device=logits.device)
    summary = torch.empty((filtered, 2), dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _summarize[(rows, parts)](
        logits,
        choice.values,
        highest,
        mass,
        where,
        groups,
        vocab_size,
        DRAWS=choice.draws,
        FILTERS=choice.filters,
        PART=_PART,
        GROUP=_GROUP,
        num_warps=8,
    )
    _pick[(rows,)](
        logits,
        choice.values,
        highest,
        mass,
        where,
        summary,
        tokens,
        rows,
        vocab_size,
        DRAWS=choice.draws,
        FILTERS=choice.filters,
        PARTS=parts,
        PARTS_PADDED=triton.next_power_of_2(parts),
        PART=_PART,
        num_warps=8,
    )
    if choice.filters:
        draw_filtered(logits, choice, summary, groups, tokens)
    return tokens

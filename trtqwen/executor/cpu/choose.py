"""`choose.choose` and `penalties.penalize` compiled for the CPU: a few passes over each row instead of a sort.

With top-k or top-p, a row's few tokens near the best one are gathered, and only those are sorted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from trtqwen.executor.choose import LEAST_TEMPERATURE, NONE_LEFT, NOT_FINITE, Choice
from trtqwen.executor.cpu.exp import COLDEST, exp
from trtqwen.executor.cpu.jit import compiled
from trtqwen.executor.penalties import LARGEST

_LANES = 128  # tokens of a row are dealt out to them, and the best of each is kept
_BLOCK = 256  # tokens whose odds are summed together
_LEAST_TEMPERATURE = np.float32(LEAST_TEMPERATURE)
_BINS_A_UNIT = np.float32(8)  # of scaled logits, whose odds are summed to find what top-p keeps
_BINS = int(-COLDEST * _BINS_A_UNIT) + 1
_MORE = np.float32(1.00001)  # a margin for rounding, where the exact threshold is known later
_LARGEST = np.float32(LARGEST)


@compiled()
def _best_of_lanes(row: Any, lanes: Any) -> Any:
    """The largest logit of each lane into `lanes`; returns whether some logit is NaN."""
    lanes[:] = np.float32(-np.inf)
    broken = 0
    size = len(row)
    for start in range(0, size - size % _LANES, _LANES):
        for i in range(_LANES):
            value = row[start + i]
            broken |= value != value
            lanes[i] = value if value > lanes[i] else lanes[i]
    for i in range(size - size % _LANES, size):
        value = row[i]
        broken |= value != value
        lanes[0] = value if value > lanes[0] else lanes[0]
    return broken != 0


@compiled(inline="always")
def _odds(scaled: Any) -> Any:
    """The exponential, or 0 where it would be no longer exact."""
    return exp(scaled) if scaled >= COLDEST else np.float32(0)


@compiled()
def _draw_of_all(row: Any, best: Any, temperature: Any, uniform: Any) -> Any:
    """The token at `uniform` of the cumulated odds of all; -1 if rounding leaves none."""
    size = len(row)
    sums = np.zeros(size // _BLOCK + 1, np.float64)
    for block in range(len(sums)):
        mass = np.float32(0)
        for token in range(block * _BLOCK, min(size, (block + 1) * _BLOCK)):
            mass += _odds((row[token] - best) / temperature)
        sums[block] = mass
    target = sums.sum() * uniform
    before = 0.0
    for block in range(len(sums)):
        if before + sums[block] > target:
            reached = before
            for token in range(block * _BLOCK, min(size, (block + 1) * _BLOCK)):
                reached += _odds((row[token] - best) / temperature)
                if reached > target:
                    return token
        before += sums[block]
    return -1


@compiled()
def _reach_of_mass(row: Any, best: Any, temperature: Any, top_p: Any) -> Any:
    """The odds of all tokens together, and a scaled logit that tokens with a share of `top_p` reach."""
    bins = np.zeros(_BINS, np.float64)
    for token in range(len(row)):
        scaled = (row[token] - best) / temperature
        if scaled >= COLDEST:
            bins[int(-scaled * _BINS_A_UNIT)] += exp(scaled)
    whole = bins.sum()
    reached = 0.0
    for i in range(_BINS):
        reached += bins[i]
        if reached >= whole * top_p:
            return whole, -np.float32(i + 1) / _BINS_A_UNIT
    return whole, COLDEST


@compiled()
def _draw_of_best(
    row: Any, lanes: Any, best: Any, temperature: Any, top_p: Any, min_p: Any, uniform: Any, top_k: Any
) -> Any:
    """The same of the tokens that top-k, then top-p, then min-p keep."""
    size = len(row)
    by_count, by_mass = 0 < top_k < size, 0 < top_p < 1
    least, whole = np.float32(-np.inf), np.float64(0)  # logit that all tokens to gather reach
    if by_count and top_k <= _LANES:
        least = np.sort(lanes)[_LANES - top_k]  # that many lanes have a token which reaches it
    elif not by_count:
        if by_mass:
            whole, reach = _reach_of_mass(row, best, temperature, top_p)
        else:
            reach = np.float32(np.log(min_p))
        least = best + reach * temperature * _MORE - abs(best) * (_MORE - np.float32(1))
    count = 0
    for token in range(size):
        count += row[token] >= least
    scaled, tokens = np.empty(count, np.float32), np.empty(count, np.int32)
    place = 0
    for token in range(size):
        if row[token] >= least:
            scaled[place], tokens[place] = (row[token] - best) / temperature, token
            place += 1
    threshold = np.float32(-np.inf)
    if by_count or by_mass:
        ordered = np.sort(scaled)[::-1]
        if by_count:
            threshold = ordered[top_k - 1]
            for i in range(count):
                whole += _odds(ordered[i]) if ordered[i] >= threshold else np.float32(0)
        if by_mass:
            kept, before = 0, np.float64(0)
            while kept < count and ordered[kept] >= threshold and before < whole * top_p:
                before += _odds(ordered[kept])
                kept += 1
            threshold = max(threshold, ordered[max(kept, 1) - 1])
    if min_p > 0:
        threshold = max(threshold, np.float32(np.log(min_p)))
    total = np.float64(0)
    for i in range(count):
        total += _odds(scaled[i]) if scaled[i] >= threshold else np.float32(0)
    reached, target = np.float64(0), total * uniform
    for i in range(count):
        if scaled[i] >= threshold:
            reached += _odds(scaled[i])
            if reached > target:
                return np.int64(tokens[i])
    return np.int64(-1)


@compiled(parallel=True, nogil=True)
def _choose(logits: Any, values: Any, output: Any) -> None:
    for index in prange(len(logits)):
        row = logits[index]
        lanes = np.empty(_LANES, np.float32)
        broken = _best_of_lanes(row, lanes)
        best = np.float32(-np.inf)
        for i in range(_LANES):
            best = lanes[i] if lanes[i] > best else best
        if broken or best == np.float32(np.inf):
            output[index] = NOT_FINITE
        elif best == np.float32(-np.inf):
            output[index] = NONE_LEFT
        else:
            temperature, top_p, min_p = values[0, index], values[1, index], values[2, index]
            uniform, top_k = values[3, index], np.int64(values[4, index])
            drawn = np.int64(-1)
            if temperature > 0:
                temperature = max(temperature, _LEAST_TEMPERATURE)
                if 0 < top_k < len(row) or 0 < top_p < 1 or min_p > 0:
                    drawn = _draw_of_best(row, lanes, best, temperature, top_p, min_p, uniform, top_k)
                else:
                    drawn = _draw_of_all(row, best, temperature, uniform)
            if drawn < 0:
                drawn = np.int64(0)
                while row[drawn] != best:
                    drawn += 1
            output[index] = drawn


# A fused multiply-add has no product that overflows, where the plain operators do.
@compiled(parallel=True, nogil=True, fastmath=False)
def _penalize(logits: Any, table: Any, slots: Any, values: Any) -> None:
    for index in prange(len(logits)):
        repetition, presence, frequency = values[0, index], values[1, index], values[2, index]
        if repetition != 1 or presence != 0 or frequency != 0:
            row, seen = logits[index], table[slots[index]]
            for token in range(len(row)):
                before, times = row[token], seen[token]
                repeated = before / repetition if before > 0 else before * repetition
                charge = presence + frequency * np.float32(times >> 1) if times > 1 else np.float32(0)
                after = (repeated if times > 0 else before) - charge
                row[token] = _LARGEST if after > _LARGEST and before <= _LARGEST else after


def choose_compiled(logits: Tensor, choice: Choice) -> Tensor:
    """See `choose.choose`."""
    output = torch.empty(len(logits), dtype=torch.int64)
    _choose(logits.float().contiguous().numpy(), choice.values.numpy(), output.numpy())
    return output


def penalize_compiled(logits: Tensor, table: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """See `penalties.penalize`."""
    logits = logits.float().contiguous()
    _penalize(logits.numpy(), table.numpy(), slots.numpy(), values.numpy())
    return logits


def compile_sampling() -> None:
    """Compile both, or load them from disk, so that no request waits for it."""
    logits, values = torch.zeros(1, _LANES), torch.zeros(5, 1)
    choose_compiled(logits, Choice(values, draws=False, filters=False))
    penalize_compiled(
        logits, torch.zeros(1, _LANES, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), values[:3]
    )

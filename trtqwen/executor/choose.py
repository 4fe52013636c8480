"""Chooses one token for each row of logits: greedy, or drawn with temperature, top-k, top-p and min-p.

A draw inverts the cumulative distribution over token ids at one uniform number, which is a function of the request's
seed and of the token's index in its answer. The rest of the batch changes nothing, and a device needs no random
numbers of its own. Filters become one threshold for each row, and tokens whose logits tie with it stay, as in
transformers' warpers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NOT_FINITE, NONE_LEFT = -1, -2
LEAST_TEMPERATURE = 1e-20  # of a draw: lower ones count as this


@dataclass(frozen=True)
class Choice:
    """The sampling parameters of some rows.

    Attributes:
        values: float32 [5, rows]: temperature, top_p, min_p, a uniform number in [0, 1), and top_k (0 is no limit).
            temperature 0 is greedy.
        draws: whether some row is not greedy.
        filters: whether some drawn row has top_k, top_p or min_p.
    """

    values: Tensor
    draws: bool
    filters: bool


def uniforms(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """A number in [0, 1) for each pair of seed and token index, mixed as in SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = _mix(seeds + np.uint64(0x9E3779B97F4A7C15)) + (indices + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return ((_mix(state) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).astype(np.float32)


def choose(logits: Tensor, choice: Choice) -> Tensor:
    """Choose in plain PyTorch.

    Args:
        logits: [rows, vocab_size], after everything that forbids tokens or changes their odds.

    Returns:
        int64 [rows]: token ids, or `NOT_FINITE`, or `NONE_LEFT` where every token is forbidden.
    """
    best, tokens = logits.max(dim=-1)
    if choice.draws:
        temperature, top_p, min_p, uniform, top_k = choice.values
        scaled = (logits - best[:, None]).float() / temperature.clamp(min=LEAST_TEMPERATURE)[:, None]
        if choice.filters:
            scaled = scaled.masked_fill(scaled < _threshold(scaled, top_k, top_p, min_p)[:, None], float("-inf"))
        sums = scaled.exp().cumsum(dim=-1)
        drawn = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
        tokens = torch.where((temperature > 0) & (drawn < logits.shape[1]), drawn, tokens)
    tokens = tokens.masked_fill(best.isneginf(), NONE_LEFT)
    return tokens.masked_fill(best.isnan() | best.isposinf(), NOT_FINITE)


def _threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest scaled logit that each row keeps; `scaled` is relative to the row's largest."""
    ordered = scaled.sort(dim=-1, descending=True).values
    vocab_size = ordered.shape[1]
    kth = torch.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size).long()
    threshold = ordered.gather(1, kth[:, None] - 1)[:, 0]
    mass = ordered.masked_fill(ordered < threshold[:, None], float("-inf")).exp()
    before = mass.cumsum(dim=-1) - mass
    limit = torch.where((top_p > 0) & (top_p < 1), top_p, 2.0) * mass.sum(dim=-1)
    kept = (before < limit[:, None]).sum(dim=-1, keepdim=True)
    threshold = torch.maximum(threshold, ordered.gather(1, kept.clamp(min=1) - 1)[:, 0])  # 0: a row of NaN
    return torch.maximum(threshold, min_p.log())


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed

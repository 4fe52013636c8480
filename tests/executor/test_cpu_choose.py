"""The compiled sampling against the plain one, which test_sampling.py holds against transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtqwen.executor.choose import NONE_LEFT, NOT_FINITE, Choice, choose
from trtqwen.executor.cpu.choose import choose_compiled, penalize_compiled
from trtqwen.executor.penalties import penalize

ROWS = 6
temperatures = st.sampled_from([0.0, 1e-30, 0.01, 0.6, 1.0, 5.0])
shares = st.sampled_from([0.0, 1e-6, 0.3, 0.8, 0.999, 1.0])
counts = st.sampled_from([0, 1, 2, 20, 127, 128, 129, 400, 1 << 24])
rows = st.lists(
    st.tuples(temperatures, shares, st.sampled_from([0.0, 1e-3, 0.2, 1.0]), st.floats(0, 1 - 2**-24), counts),
    min_size=ROWS,
    max_size=ROWS,
)


def nearly(got: torch.Tensor, logits: torch.Tensor, choice: Choice) -> None:
    """Equal tokens, or for the other sums of a draw, those of a uniform number next to its own."""
    expected = choose(logits.clone(), choice)
    below, above = choice.values.clone(), choice.values.clone()
    below[3] -= 1e-5
    above[3] += 1e-5
    near = [choose(logits.clone(), Choice(values.clamp(min=0), choice.draws, True)) for values in (below, above)]
    low, high = (torch.minimum(*near), torch.maximum(*near))
    assert ((got == expected) | (got >= low) & (got <= high)).all(), (got, expected, choice.values)


@settings(max_examples=60, deadline=None)
@given(
    rows, st.sampled_from([1, 5, 127, 128, 129, 500, 4096]), st.sampled_from([0.05, 3.0, 40.0]), st.integers(0, 99)
)
def test_tokens_are_those_of_the_plain_sampler(
    drawn: list[tuple[float, float, float, float, int]], vocab_size: int, spread: float, seed: int
) -> None:
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, vocab_size, generator=dice) * spread
    logits[seed % ROWS, ::3] = float("-inf")  # forbidden tokens
    logits[(seed + 1) % ROWS] = logits[(seed + 1) % ROWS].round()  # ties
    values = torch.tensor(drawn).T.contiguous()
    nearly(choose_compiled(logits, Choice(values, True, True)), logits, Choice(values, True, True))


@pytest.mark.parametrize("place", [0, 130, 299])
def test_a_broken_row_is_told_and_a_forbidden_one(place: int) -> None:
    logits = torch.randn(4, 300)
    logits[0, place] = float("nan")
    logits[1, place] = float("inf")
    logits[2] = float("-inf")
    for draws in (False, True):
        values = torch.tensor([[0.7 * draws, 0.8, 0.0, 0.5, 20.0]] * 4).T.contiguous()
        got = choose_compiled(logits, Choice(values, draws, draws))
        assert got[:3].tolist() == [NOT_FINITE, NOT_FINITE, NONE_LEFT]
        assert got[3] >= 0


def test_draws_have_their_odds() -> None:
    odds = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(1000) + 0.5) / 1000
    for top_k, top_p, kept in ((0, 1.0, 4), (3, 1.0, 3), (0, 0.7, 2), (3, 0.5, 1)):
        values = torch.stack([torch.ones(1000), torch.full((1000,), top_p), torch.zeros(1000), uniform])
        values = torch.cat([values, torch.full((1, 1000), float(top_k))])
        drawn = choose_compiled(odds.log().expand(1000, 4), Choice(values, True, True))
        shares = torch.bincount(drawn, minlength=4) / 1000
        expected = odds * (torch.arange(4) < kept)
        torch.testing.assert_close(shares, expected / expected.sum(), atol=2e-3, rtol=0)


def test_penalties_are_those_of_the_plain_sampler() -> None:
    logits = torch.randn(6, 500) * 10
    logits[5, 3], logits[5, 4], logits[4, 5] = float("nan"), float("inf"), float("-inf")
    table = torch.randint(0, 6, (8, 500), dtype=torch.int32)
    slots = torch.tensor([7, 0, 3, 2, 5, 1])
    values = torch.tensor(
        [[1.3, 0.7, 1.0, 1.0, 1.0, 1.1], [0.0, 0.5, -0.5, 0.0, 3e38, 0.0], [0.0, 0.1, 0.2, 0.0, -3e38, 0.0]]
    )
    expected = penalize(logits.clone(), table, slots, values)
    torch.testing.assert_close(penalize_compiled(logits.clone(), table, slots, values), expected, equal_nan=True)

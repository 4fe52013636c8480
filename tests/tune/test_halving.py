"""Successive halving against functions whose best arm is known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtqwen.tune.halving import budgets, successive_halving


def test_the_whole_budget_is_a_third_of_the_grid() -> None:
    lengths = budgets(270, 3, 3)
    assert lengths == [30, 90, 270]
    spent: list[int] = []

    def run(arm: int, length: int) -> tuple[float, ...]:
        spent.append(length)
        return (float(abs(arm - 19)),)

    ranked = successive_halving(range(27), lengths, 3, run)
    assert ranked[0] == (19, (0.0,))
    assert sum(spent) == 27 * 270 // 3


@given(
    arms=st.lists(st.floats(0, 1000), min_size=1, max_size=40, unique=True),
    factor=st.integers(2, 4),
    rungs=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_noise_that_shrinks_with_the_length_does_not_hide_a_clear_best(
    arms: list[float], factor: int, rungs: int, seed: int
) -> None:
    dice = random.Random(seed)
    best = min(arms) - 200  # further ahead than the noise of the shortest run
    pool = [*arms, best]
    dice.shuffle(pool)
    ranked = successive_halving(
        pool, budgets(64, rungs, factor), factor, lambda arm, length: (arm + dice.uniform(-90, 90) / length,)
    )
    assert ranked[0][0] == best


@pytest.mark.parametrize("count", [2, 6, 27])
def test_the_kept_arm_gets_a_whole_run_and_does_not_push_out_the_best(count: int) -> None:
    ranked = successive_halving(range(count), [1, 3, 9], 3, lambda arm, length: (float(arm),), keep=count - 1)
    arms = [arm for arm, _ in ranked]
    assert arms[0] == 0
    assert count - 1 in arms


def test_failures_leave_and_do_not_end_the_search() -> None:
    def run(arm: int, length: int) -> tuple[float, ...] | None:
        return None if arm % 2 or (arm == 0 and length == 9) else (float(arm),)

    ranked = successive_halving(range(12), [1, 3, 9], 3, run, keep=1)
    assert [arm for arm, _ in ranked] == [2]
    assert successive_halving(range(3), [1, 3], 3, lambda arm, length: None) == []


def test_arms_that_score_alike_do_not_fill_the_places() -> None:
    scores = {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}
    later = {3: 0.0}
    ranked = successive_halving(
        range(6), [1, 3], 3, lambda arm, length: (later.get(arm, 9.0) if length == 3 else scores[arm],)
    )
    assert [arm for arm, _ in ranked] == [3, 0]


def test_short_runs_are_at_least_one_long_and_alike_ones_are_left_out() -> None:
    assert budgets(2, 3, 3) == [1, 2]
    assert budgets(1, 3, 3) == [1]

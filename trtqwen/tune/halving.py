"""Successive halving: many configurations get a short run, the best of them a longer one, the last few a full one.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Arm = TypeVar("Arm")


def budgets(largest: int, rungs: int, factor: int) -> list[int]:
    """Return the length of a run on each rung, the full run last, without equal rungs."""
    found = [max(1, round(largest / factor ** (rungs - 1 - rung))) for rung in range(rungs)]
    return sorted(set(found))


def successive_halving(
    arms: Sequence[Arm],
    lengths: Sequence[int],
    factor: int,
    run: Callable[[Arm, int], tuple[float, ...] | None],
    keep: Arm | None = None,
) -> list[tuple[Arm, tuple[float, ...]]]:
    """Run the arms and return those with a full run, the best first.

    Args:
        lengths: of the runs on each rung, rising.
        factor: one in `factor` arms continues to the next rung, rounded up.
        run: measures an arm in a run of a length; lower is better, None if it failed. Of arms with equal
            scores, the first is the better one, and the others continue only after all different ones.
        keep: arm that continues to the end unless it fails, in place of the worst one that would.
    """
    alive = list(arms)
    ranked: list[tuple[Arm, tuple[float, ...]]] = []
    for rung, length in enumerate(lengths):
        scored = [(arm, run(arm, length)) for arm in alive]
        ranked = sorted(((arm, score) for arm, score in scored if score is not None), key=lambda pair: pair[1])
        if rung == len(lengths) - 1:
            break
        count = -(-len(alive) // factor)
        survivors = [arm for arm, _ in _different_first(ranked)[:count]]
        if keep is not None and keep not in survivors and any(arm == keep for arm, _ in ranked):
            survivors[max(1, len(survivors) - 1) :] = [keep]
        alive = survivors
    return ranked


def _different_first(ranked: list[tuple[Arm, tuple[float, ...]]]) -> list[tuple[Arm, tuple[float, ...]]]:
    seen: set[tuple[float, ...]] = set()
    alike: list[tuple[Arm, tuple[float, ...]]] = []
    different: list[tuple[Arm, tuple[float, ...]]] = []
    for pair in ranked:
        (alike if pair[1] in seen else different).append(pair)
        seen.add(pair[1])
    return different + alike

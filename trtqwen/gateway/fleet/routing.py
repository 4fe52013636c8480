"""Choice of the target that answers a request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import xxhash

T = TypeVar("T")
_HASHES = 2.0**64


def choose(
    targets: Sequence[T], weight: Callable[[T], float], name: Callable[[T], str], who: str | None, model: str
) -> T:
    """A target by weight; the same one for the same `who`, as long as its weight does not fall.

    Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): each target scores by its weight and a hash of
    itself and `who`. When a weight grows, keys move to that target alone; none moves between the others.

    Args:
        who: key that stays with a target; None chooses at random.
    """
    if len(targets) == 1:
        return targets[0]
    if who is None:
        return random.choices(targets, [weight(target) for target in targets])[0]
    return max(targets, key=lambda target: _score(weight(target), f"{model}\0{name(target)}\0{who}"))


def _score(weight: float, text: str) -> float:
    draw = (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) + 0.5) / _HASHES
    return weight / -math.log(draw) if draw < 1 else math.inf

"""What is exhaustive. `make test` leaves it out, `make test-slow` runs it.

A case is slow only where a quick one runs the same code. A test that starts a server of its own is slow where a quick
one runs the same code in a shared server, or with a stand-in for the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

SLOW = pytest.mark.slow


def slow(*values: Any, **options: Any) -> Any:
    """A case of `parametrize` that is slow."""
    return pytest.param(*values, marks=SLOW, **options)


def every(step: int, cases: Sequence[Any]) -> list[Any]:
    """Cases of which each `step`th is quick, the first among them."""
    return [pytest.param(case, marks=() if index % step == 0 else SLOW) for index, case in enumerate(cases)]

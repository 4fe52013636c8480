"""Waiting for events. No test depends on how fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

GENEROUS = 60.0  # seconds; a machine with many other processes needs a few of them


def wait_for(condition: Callable[[], bool], seconds: float = GENEROUS) -> bool:
    """Tell whether the condition becomes true within a generous time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def sometimes(attempt: Callable[[], bool], times: int = 20) -> bool:
    """Tell whether an attempt succeeds: on a busy machine, an answer may be over before its reader looks at it."""
    return any(attempt() for _ in range(times))

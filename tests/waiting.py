"""Waiting for events. No test depends on how fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

GENEROUS = 60.0  # seconds; a machine with many other processes needs a few of them


def wait_for(condition: Callable[[], bool], seconds: float = GENEROUS) -> bool:
    """Tell whether the condition becomes true within a generous time.

    It is asked less often the longer it takes: what is waited for needs the processors more than this does.
    """
    begun = asked = time.monotonic()
    while asked - begun < seconds:
        if condition():
            return True
        took, waited = time.monotonic() - asked, time.monotonic() - begun
        time.sleep(min(0.1, max(0.02, 2 * took, waited / 20)))
        asked = time.monotonic()
    return condition()


def sometimes(attempt: Callable[[], bool], times: int = 20) -> bool:
    """Tell whether an attempt succeeds: on a busy machine, an answer may be over before its reader looks at it."""
    return any(attempt() for _ in range(times))

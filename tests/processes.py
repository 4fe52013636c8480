"""Real processes that tests start and kill."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own; returns its id. An exception makes its exit code 1."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own to its end; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])

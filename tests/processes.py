"""Real processes that tests start and kill."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trtqwen.system.processes import runs


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


def children(pid: int) -> list[int]:
    """Process ids of a process's children that have not ended. One that was killed and is not reaped has."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # the thread has ended
            found += filter(runs, map(int, (thread / "children").read_text().split()))
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Process ids of a process's children, of theirs, and so on."""
    return sorted(found for child in children(pid) for found in (child, *descendants(child)))

"""A thread pool in which owners take turns, so that one owner's work never blocks another's."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

_NICENESS = 5  # below the step loop: with both on one core, a quarter of it


class FairPool:
    """Runs functions in threads of low priority. Owners take turns.

    Args:
        most_per_owner: threads that one owner may have at a time. There is one more, for the others.
    """

    def __init__(self, most_per_owner: int, name: str) -> None:
        self._most_per_owner = most_per_owner
        self._waiting: OrderedDict[str, deque[tuple[Future[None], Callable[[], None]]]] = OrderedDict()
        self._running: dict[str, int] = {}
        self._ready = threading.Condition()
        for number in range(most_per_owner + 1):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def submit(self, owner: str, function: Callable[[], None]) -> Future[None]:
        """Queue a function, which must not raise; cancelling the future takes it out of the queue."""
        future: Future[None] = Future()
        with self._ready:
            self._waiting.setdefault(owner, deque()).append((future, function))
            self._ready.notify()
        return future

    def _work(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            owner, future, function = self._take()
            try:
                if future.set_running_or_notify_cancel():
                    function()
                    future.set_result(None)
            finally:
                self._end(owner)

    def _take(self) -> tuple[str, Future[None], Callable[[], None]]:
        with self._ready:
            while True:
                for owner, waiting in self._waiting.items():
                    if self._running.get(owner, 0) < self._most_per_owner:
                        future, function = waiting.popleft()
                        self._running[owner] = self._running.get(owner, 0) + 1
                        self._waiting.move_to_end(owner)
                        if not waiting:
                            del self._waiting[owner]
                        return owner, future, function
                self._ready.wait()

    def _end(self, owner: str) -> None:
        with self._ready:
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]
            self._ready.notify()

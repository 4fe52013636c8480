"""Whether an engine hangs: its model touches a file whenever the engine answers between two steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from trtqwen.system.processes import cpu_seconds, living, stopped

_PATIENCE = 10  # times the limit: how long a step may take whose processes compute
_SAMPLE_SECONDS = 3.0
_IDLE = 0.1  # share of one core below which nothing computes


class Watchdog:
    """Watches the heartbeat of one server's engine.

    A long prompt on a slow CPU may take a minute for one step. So an engine that is late hangs only when its
    processes do not compute, or after ten times the limit. On GPUs, steps are short and a rank that waits computes:
    there the limit holds.

    Args:
        sessions: of the server's processes and of its engine's.
        heartbeat: file whose modification time is the engine's last answer, in seconds of the monotonic clock.
        limit: seconds between two answers.
        strict: whether the limit holds for processes that compute.
    """

    def __init__(self, sessions: Sequence[int], heartbeat: Path, limit: float, *, strict: bool) -> None:
        self._sessions = tuple(sessions)
        self._heartbeat = heartbeat
        self._limit = limit
        self._strict = strict
        self._sample: tuple[float, float] | None = None  # when, and CPU seconds of the sessions

    def hung(self) -> str | None:
        """What hangs and since when; None if nothing does."""
        now = time.monotonic()
        try:
            silence = now - self._heartbeat.stat().st_mtime
        except FileNotFoundError:
            return None  # another kind of engine, or it still loads
        if silence < self._limit:
            self._sample = None
            return None
        if frozen := [f"process {pid}" for pid in self._processes() if stopped(pid)]:
            return f"{', '.join(frozen)} is stopped (SIGSTOP), and no step has ended for {silence:.0f} s"
        if self._strict or silence > _PATIENCE * self._limit or self._idle(now):
            return f"no step of the engine has ended for {silence:.0f} s"
        return None

    def _processes(self) -> Iterator[int]:
        return chain.from_iterable(map(living, self._sessions))

    def _idle(self, now: float) -> bool:
        used = sum(map(cpu_seconds, self._processes()))
        if self._sample is None:
            self._sample = now, used
        begun, before = self._sample
        if now - begun < _SAMPLE_SECONDS:
            return False
        self._sample = None
        return used - before < _IDLE * (now - begun)

"""Detection of a hung engine: by a file that trtqwen's models touch, or by TensorRT-LLM's iteration counter."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

from trtqwen.system.processes import busy_nanoseconds, cpu_seconds, living, runnable, stopped

_PATIENCE = 10  # times the limit: how long a step may take whose processes compute
_SAMPLE_SECONDS = 3.0
_IDLE = 0.1  # share of one core below which nothing computes
_STARVED = 0.5  # share of the time for which a thread would compute if the machine let it
_LOOK_SECONDS, _ANSWER_SECONDS = 1.0, 0.5
_ITERATIONS = re.compile(
    r'^nv_trt_llm_general_metrics\{[^}]*general_type="iteration_counter"[^}]*\} (\S+)', re.MULTILINE
)
_ACTIVE = re.compile(r'^nv_trt_llm_request_metrics\{[^}]*request_type="active"[^}]*\} (\S+)', re.MULTILINE)


class Progress(Protocol):
    """A sign of an engine's progress."""

    def silence(self) -> float | None:
        """Return the seconds since the last progress; None before the first."""


class Heartbeat:
    """A file whose modification time is the last time that the engine answered between two steps.

    Args:
        path: the time is in seconds of the monotonic clock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def silence(self) -> float | None:
        """Seconds since the engine's last answer; None while it loads."""
        try:
            return time.monotonic() - self._path.stat().st_mtime
        except FileNotFoundError:
            return None


class IterationCounter:
    """The counter of TensorRT-LLM's C++ backend in Triton's metrics. An engine without requests need not count.

    Args:
        url: of the metrics.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._count: str | None = None
        self._worked_at: float | None = None
        self._next_look = float("-inf")

    def silence(self) -> float | None:
        """Seconds since the counter moved or no request was active; None before the metrics are there."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._look(now)
        return None if self._worked_at is None else now - self._worked_at

    def _look(self, now: float) -> None:
        try:
            with urllib.request.urlopen(self._url, timeout=_ANSWER_SECONDS) as response:
                text = response.read().decode("utf-8", "replace")
        except OSError:
            return  # a Triton that does not answer does not work either
        count, active = _ITERATIONS.search(text), _ACTIVE.search(text)
        if count is None or active is None:
            return
        if count[1] != self._count or float(active[1]) == 0 or self._worked_at is None:
            self._count, self._worked_at = count[1], now


class Watchdog:
    """Watches the progress of one server's engine.

    A long prompt on a slow CPU may take a minute for one step. Beyond the limit, an engine therefore counts as hung
    only if its processes neither compute nor wait for a busy CPU, or after ten times the limit. On GPUs, steps are
    short, and a waiting rank also computes, so the limit is strict.

    Args:
        sessions: of the server's processes and of its engine's.
        limit: seconds between two signs of progress.
        strict: whether the limit holds for processes that compute.
    """

    def __init__(self, sessions: Sequence[int], progress: Progress, limit: float, *, strict: bool) -> None:
        self._sessions = tuple(sessions)
        self._progress = progress
        self._limit = limit
        self._strict = strict
        # When, CPU seconds of the sessions, and how long each thread wanted a CPU.
        self._sample: tuple[float, float, dict[int, int]] | None = None

    def hung(self) -> str | None:
        """Describe what hangs and since when; None if nothing hangs."""
        now = time.monotonic()
        silence = self._progress.silence()
        if silence is None:
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
        processes = list(self._processes())
        used = sum(map(cpu_seconds, processes))
        busy = {thread: time for pid in processes for thread, time in busy_nanoseconds(pid).items()}
        if self._sample is None:
            self._sample = now, used, busy
        begun, used_before, busy_before = self._sample
        seconds = now - begun
        if seconds < _SAMPLE_SECONDS:
            return False
        self._sample = None
        if used - used_before >= _IDLE * seconds:
            return False
        # On a busy machine, a thread that computes may get less than that for seconds. The kernel counts the time
        # that a thread has waited only when it runs again.
        if any(map(runnable, processes)):
            return False
        wanted = max((busy[thread] - busy_before[thread] for thread in busy.keys() & busy_before.keys()), default=0)
        return wanted < _STARVED * seconds * 1e9

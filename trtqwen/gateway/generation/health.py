"""Health checks of the engine: a request for one token from time to time, unless its answers show that it works."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import aclosing

import anyio
import numpy as np

from trtqwen.gateway.admission.gate import Gate, down
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.metrics import Metrics

_log = logging.getLogger(__name__)
_PAUSE_SECONDS = 0.2  # many answers that fail at once are one reason to look
_PATIENCE = 10  # times `probe_seconds`: how long the only replica that works may be silent
_PROBE_INPUTS = {
    "input_ids": np.zeros((1, 1), np.int32),
    "input_lengths": np.ones((1, 1), np.int32),
    "request_output_len": np.ones((1, 1), np.int32),
    "streaming": np.array([[True]]),
}


class Monitor:
    """Watches the replicas, removes failed ones from the gate, and adds them again when they answer.

    If a replica fails, its running answers end immediately with an error, because a killed backend would leave them
    hanging. If it is only silent, they continue until they are stalled. The token of the health check waits behind
    prompts that the replica reads, so these lengthen the allowed time.

    A silent replica may only be slow. It is asked again, each time with twice the allowed time. It is removed
    immediately if another one works, and otherwise after a silence of ten times `probe_seconds` or `stall_seconds`.

    Args:
        probe_seconds: how long a replica may be silent before it is asked, and how long it may take to answer at
            first. The death of its server or its backend is noticed within twice that.
        stall_seconds: silence after which an answer is ended.
        prompt_tokens_per_second: slowest rate at which a working engine reads prompts.
        on_change: called when a replica may have begun or ceased to work.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        gate: Gate,
        metrics: Metrics,
        *,
        probe_seconds: float,
        stall_seconds: float,
        prompt_tokens_per_second: float,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._replicas = replicas
        self._gate = gate
        self._metrics = metrics
        self._probe_seconds = probe_seconds
        self._stall_seconds = stall_seconds
        self._patience = min(stall_seconds, _PATIENCE * probe_seconds)
        self._prompt_tokens_per_second = prompt_tokens_per_second
        self._on_change = on_change
        self._up = [False] * len(replicas)
        self._answered = [float("-inf")] * len(replicas)  # when each last answered a probe
        self._proven = [float("-inf")] * len(replicas)  # when that probe began
        self._missed = [0] * len(replicas)  # probes in a row that it has not answered in time
        self._told = [""] * len(replicas)
        self._look_now = [asyncio.Event() for _ in replicas]
        for number in range(len(replicas)):
            self._mark(number, False)

    @property
    def ready(self) -> bool:
        """Whether any replica works."""
        return any(self._up)

    async def watch(self) -> None:
        """Look after the replicas until cancelled."""
        await asyncio.gather(*(self._watch(number) for number in range(len(self._replicas))))

    def suspect(self, replica: Replica) -> None:
        """Check a replica immediately, because an answer failed there."""
        self._look_now[self._replicas.index(replica)].set()

    def look(self) -> None:
        """Ask every replica now."""
        for event in self._look_now:
            event.set()

    def answered_since(self, when: float) -> bool:
        """Whether every replica has answered a probe that began after that, in seconds of the monotonic clock."""
        return all(begun > when for begun in self._proven)

    async def _watch(self, number: int) -> None:
        replica, look_now = self._replicas[number], self._look_now[number]
        while True:
            suspected = look_now.is_set()
            look_now.clear()
            if suspected or time.monotonic() - replica.heard >= self._probe_seconds or not self._up[number]:
                try:
                    await self._probe(number)
                except Exception as problem:
                    self._tell(number, f"sent an unexpected response ({problem})")
                    self._mark(number, False)
                await asyncio.sleep(_PAUSE_SECONDS)
            replica.abort_stalled(self._stall_seconds, self._reading_seconds(replica))
            silence = time.monotonic() - replica.heard
            pause = self._probe_seconds - silence if silence < self._probe_seconds else self._probe_seconds
            if self._missed[number] and self._up[number]:
                pause = 0
            # asyncio.wait_for loses a cancellation before Python 3.12, and the task would not end.
            with anyio.move_on_after(max(pause, _PAUSE_SECONDS)):
                await look_now.wait()

    async def _probe(self, number: int) -> None:
        replica, begun = self._replicas[number], time.monotonic()
        longer = max(self._probe_seconds, self._patience)
        seconds = min(self._probe_seconds * 2.0 ** self._missed[number], longer)
        timeout = seconds + self._reading_seconds(replica)
        replies = replica.generate(f"probe-{uuid.uuid4().hex}", _PROBE_INPUTS, timeout)
        result = says = "ok"
        try:
            async with aclosing(replies):
                async for _ in replies:
                    pass
        except ApiError as problem:
            result, says = problem.code, problem.message
            if result == "timeout":
                says = f"no token came within {timeout:.0f} s"
            if problem.status == 503:
                replica.abort_all(problem)
        self._metrics.probes.labels(result).inc()
        late = result == "timeout" and replica.heard > begun  # others have had tokens meanwhile
        works = late or result in ("ok", "queue_full")
        if works:
            self._answered[number] = time.monotonic()
        if works and not late:  # tokens of other requests may have been in flight
            self._proven[number] = begun
        self._missed[number] = 0 if works or result != "timeout" else self._missed[number] + 1
        self._tell(number, "works" if works else says)
        works = works or (result == "timeout" and self._may_be_slow(number))
        self._mark(number, works)
        if result == "engine_dead" and not self.ready:
            self._gate.send_away(down())

    def _may_be_slow(self, number: int) -> bool:
        """Return whether a replica that has not answered in time still gets requests."""
        if not self._up[number] or sum(self._up) > 1:
            return False
        replica = self._replicas[number]
        silence = time.monotonic() - max(replica.heard, self._answered[number])
        return silence < self._patience + self._reading_seconds(replica)

    def _reading_seconds(self, replica: Replica) -> float:
        """Return the allowed time for the prompts that a replica has not answered yet."""
        return replica.unread_tokens / self._prompt_tokens_per_second

    def _tell(self, number: int, what: str) -> None:
        """Log a change of a replica."""
        if what != self._told[number] and (what != "works" or self._told[number]):
            _log.warning("%s: %s", self._replicas[number].address, what)
        self._told[number] = what

    def _mark(self, number: int, up: bool) -> None:
        self._up[number] = up
        self._gate.set_up(number, up)
        self._metrics.replica_up.labels(self._replicas[number].address).set(up)
        self._on_change()

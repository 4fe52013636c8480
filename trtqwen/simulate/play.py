"""Simulation of a workload on virtual engines: clients, router and clock of a load test."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count

from trtqwen.bench.records import RequestRecord
from trtqwen.bench.workload import Ask
from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import Request
from trtqwen.executor.sequence import Generated
from trtqwen.simulate.engine import VirtualEngine

OnDone = Callable[[int], None]


def play(
    asks: Sequence[Ask],
    engines: Sequence[VirtualEngine],
    *,
    concurrency: int | None,
    token_seconds: float = 0.0,
    on_done: OnDone = lambda count: None,
) -> tuple[RequestRecord, ...]:
    """Send the requests and record when their tokens arrive, in virtual seconds from the start.

    Args:
        engines: replicas; as in the gateway, a request goes to the one with the fewest outstanding tokens.
        concurrency: how many are open at a time; None sends each at its time.
        token_seconds: what the one process between engines and clients needs for a token.
        on_done: called with 1 for each request that ends.

    Returns:
        The records in the order of the workload.
    """
    return _Player(asks, engines, concurrency, token_seconds, on_done).play()


class _Player:
    def __init__(
        self,
        asks: Sequence[Ask],
        engines: Sequence[VirtualEngine],
        concurrency: int | None,
        token_seconds: float,
        on_done: OnDone,
    ) -> None:
        self._asks, self._engines, self._token_seconds, self._on_done = asks, engines, token_seconds, on_done
        self._records = [RequestRecord(index, 0.0, ask.max_tokens) for index, ask in enumerate(asks)]
        self._waiting = iter(range(len(asks))) if concurrency is not None else iter(())
        self._events: list[tuple[float, int, int | VirtualEngine]] = []
        self._numbers = count()  # of two events at one time the older comes first
        self._front_free = 0.0
        if concurrency is None:
            for index, ask in enumerate(asks):
                self._at(ask.at or 0.0, index)
        for _ in range(concurrency or 0):
            self._next(0.0)

    def play(self) -> tuple[RequestRecord, ...]:
        while self._events:
            now = self._events[0][0]
            while self._events and self._events[0][0] == now:
                _, _, what = heapq.heappop(self._events)
                if isinstance(what, int):
                    self._send(what, now)
                else:
                    self._deliver(what.finish(), now)
            for engine in self._engines:
                if engine.ends is None:
                    engine.start(now)
                    if engine.ends is not None:
                        self._at(engine.ends, engine)
        return tuple(self._records)

    def _at(self, time: float, what: int | VirtualEngine) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), what))

    def _next(self, now: float) -> None:
        """Return the next request of a closed loop, when another one has ended."""
        index = next(self._waiting, None)
        if index is not None:
            self._at(now, index)

    def _send(self, index: int, now: float) -> None:
        ask, record = self._asks[index], self._records[index]
        record.due = record.sent = now
        engine = min(self._engines, key=lambda engine: engine.open_tokens)
        try:
            engine.add(Request(id=str(index), input_token_ids=ask.token_ids, max_tokens=ask.max_tokens))
        except RequestError as problem:
            record.error = problem.what
            self._ended(record, now)

    def _deliver(self, generated: Sequence[Generated], now: float) -> None:
        for one in generated:
            record = self._records[int(one.request_id)]
            self._front_free = max(self._front_free, now) + self._token_seconds
            record.pieces.append((self._front_free, 1))
            if one.finish_reason is not None:
                record.output_tokens = len(record.pieces)
                record.prompt_tokens = len(self._asks[record.index].token_ids)
                self._ended(record, self._front_free)

    def _ended(self, record: RequestRecord, at: float) -> None:
        record.ended = at
        self._on_done(1)
        self._next(at)

"""Admission for coroutines: wait for a turn, hold it, and always release it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from trtqwen.gateway.admission.admission import Admission, Capacity, Owner, QueueFull, QueueLimits, Ticket
from trtqwen.gateway.admission.auth import CALLER
from trtqwen.gateway.errors import ApiError, bad_request, late
from trtqwen.gateway.metrics import Load, Metrics

_RECENT_SECONDS = 60.0  # that the mean time of requests covers
_LONGEST_ADVICE = 60  # seconds of Retry-After
Prefixes = Sequence[int]
_Turns = dict[Ticket, asyncio.Future[int]]


@dataclass(frozen=True)
class GatePlan:
    """The arguments of a gate; see `Gate`."""

    replicas: tuple[str, ...]
    capacity: Capacity
    queue: QueueLimits
    queue_seconds: float
    throttle_seconds: float | None = None
    share: float = 1

    def build(self, metrics: Metrics) -> Gate:
        admission = Admission(len(self.replicas), self.capacity, self.queue)
        return Gate(admission, metrics, self.queue_seconds, self.replicas, self.throttle_seconds, self.share)


class Gate:
    """Assigns turns on the engine.

    Args:
        queue_seconds: how long a ticket may wait.
        replicas: names of the replicas in the metrics.
        throttle_seconds: mean time of a request beyond which none may wait; None is no limit.
        share: largest share of the engines that one key may use at a time.
    """

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        queue_seconds: float,
        replicas: Sequence[str] = (),
        throttle_seconds: float | None = None,
        share: float = 1,
    ) -> None:
        self._share = share
        self._admission = admission
        self._metrics = metrics
        self._replicas = [
            (metrics.replica_in_flight.labels(name), metrics.replica_in_flight_tokens.labels(name))
            for name in replicas
        ]
        self._queue_seconds = queue_seconds
        self._throttle_seconds = throttle_seconds
        self._recent = RecentMean(_RECENT_SECONDS)
        self._turns: dict[Ticket, _Turns] = {}  # for each ticket, those of all that came with it, its own among them
        self._draining = False
        self._service_seconds = 1.0  # how long a turn lasts, averaged over the recent ones

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def idle(self) -> bool:
        return not self._turns

    def check_room(self, priority: int = 0) -> None:
        """Refuse a request early if the queue has no room: under overload, even its tokenization would delay others.

        Args:
            priority: of the request among those of its key.

        Raises:
            ApiError: as `places` does.
        """
        self._refuse_at_the_door()
        if self._admission.would_refuse(self._owner(), priority):
            raise self._too_busy(self._full(), "queue_full")

    @contextmanager
    def places(
        self, token_counts: Sequence[int], prefixes: Sequence[Prefixes] = (), priority: int = 0
    ) -> Iterator[list[Ticket]]:
        """Queue one ticket for each count, all or none. Tickets that are still held at the end are released.

        Args:
            prefixes: the beginnings of each ticket's prompt; none sends it to the replica with the fewest tokens.
            priority: of the request among those of its key; the lowest goes first.

        Raises:
            ApiError: 429 if the queue is full or requests take too long, 503 if the gateway stops or no replica is
                up, 400 if the counts are more than can run and wait at any time.
        """
        self._refuse_at_the_door()
        owner, now = self._owner(), time.monotonic()
        beginnings = prefixes or [()] * len(token_counts)
        tickets = [
            Ticket(count, owner, now, tuple(begun), priority)
            for count, begun in zip(token_counts, beginnings, strict=True)
        ]
        loop = asyncio.get_running_loop()
        turns: _Turns = {ticket: loop.create_future() for ticket in tickets}
        try:
            self._turns |= dict.fromkeys(tickets, turns)
            self._grant(self._admission.arrive(tickets))
            self._tell_pushed_out()
            self._throttle(turns.values(), now)
            yield tickets
        except QueueFull:
            if self._admission.has_room_when_idle(tickets):
                raise self._too_busy(self._full(), "queue_full") from None
            raise bad_request(
                f"{len(tickets)} answers of {sum(token_counts)} tokens, prompts included, are more than this server "
                "runs and queues at once; ask for fewer answers or a lower max_tokens",
                code="too_much",
            ) from None
        finally:
            for ticket in tickets:
                self.give_back(ticket)

    async def turn(self, ticket: Ticket, deadline: float) -> int:
        """Wait for the ticket's turn; returns the number of the replica to use.

        Args:
            deadline: of the whole request, in seconds of the monotonic clock.

        Raises:
            ApiError: 429 if no ticket of the request has had a turn after `queue_seconds`, 504 if the deadline comes
                before the turn.
        """
        begun = time.monotonic()
        turns = self._turns[ticket]
        turn = turns[ticket]
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the turn.
            await asyncio.wait((turn,), timeout=min(self._queue_seconds, deadline - begun))
            if time.monotonic() < deadline and not any(other.done() for other in turns.values()):
                raise self._too_busy(
                    f"no turn came within {self._queue_seconds:g} s (queue_seconds)", "queue_timeout"
                )
            if not turn.done():
                await asyncio.wait((turn,), timeout=deadline - time.monotonic())
            if not turn.done():
                raise late()
            return turn.result()
        finally:
            self._metrics.queue_seconds.observe(time.monotonic() - begun)

    def give_back(self, ticket: Ticket, lasted: float | None = None) -> None:
        """End a ticket, waiting or running; nothing happens the second time.

        Args:
            lasted: seconds that its turn took to a regular end.
        """
        if self._turns.pop(ticket, None) is None:
            return
        if lasted is not None:
            self._service_seconds += 0.1 * (lasted - self._service_seconds)
            now = time.monotonic()
            self._recent.add(now - ticket.arrived, now)
        self._admission.leave(ticket)
        self._grant(self._admission.admit())

    def grow(self, ticket: Ticket, tokens: int) -> None:
        """Count more tokens for a running ticket, whose answer has got longer than was reserved."""
        self._admission.grow(ticket, tokens)
        self._show()

    def set_up(self, replica: int, up: bool) -> None:
        """Whether a replica takes requests."""
        self._admission.set_up(replica, up)
        self._grant(self._admission.admit())

    def send_away(self, failure: ApiError) -> None:
        """End the wait of all waiting requests. A request with a running answer continues."""
        for ticket, turns in self._turns.items():
            if (
                not any(turn.done() and turn.exception() is None for turn in turns.values())
                and not turns[ticket].done()
            ):
                turns[ticket].set_exception(failure)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    def close(self) -> None:
        """Remove the engine from the metrics."""
        self._metrics.forget_load(self)
        for requests, tokens in self._replicas:
            requests.set(0)
            tokens.set(0)

    def has_free_turn(self, tokens: int) -> bool:
        """Return whether a ticket of this many tokens would have its turn immediately."""
        return not self._draining and self._admission.has_free_replica(tokens)

    def _grant(self, admitted: Sequence[tuple[Ticket, int]]) -> None:
        for ticket, replica in admitted:
            turn = self._turns[ticket][ticket]
            if not turn.done():
                turn.set_result(replica)
        self._show()

    def _show(self) -> None:
        admission, oldest = self._admission, self._admission.oldest
        load = Load(
            admission.in_flight,
            admission.in_flight_tokens,
            admission.queued,
            admission.queued_tokens,
            0 if oldest is None else time.time() - (time.monotonic() - oldest.arrived),
            admission.capacity.tokens * admission.replicas,
        )
        self._metrics.show_load(self, load)
        for number, (requests, tokens) in enumerate(self._replicas):
            running, reserved = admission.running(number)
            requests.set(running)
            tokens.set(reserved)

    def _owner(self) -> Owner:
        """Return the owner of the current request's tickets."""
        caller = CALLER.get()
        in_flight = [caller.most_in_flight] if caller.most_in_flight is not None else []
        if self._share < 1:
            in_flight.append(max(1, int(self._admission.slots * self._share)))
        return Owner(caller.name, min(in_flight, default=None), caller.most_queued)

    def _tell_pushed_out(self) -> None:
        for ticket in self._admission.pushed_out:
            turn = self._turns[ticket][ticket]
            if not turn.done():
                turn.set_exception(self._too_busy("the queue is full, and others have waited for less", "queue_full"))
        self._admission.pushed_out.clear()

    def _refuse_at_the_door(self) -> None:
        if self._draining:
            raise stopping()
        if not self._admission.any_up:
            raise down()

    def _throttle(self, turns: Iterable[asyncio.Future[int]], now: float) -> None:
        limit = self._throttle_seconds
        if limit is None or all(turn.done() for turn in turns):
            return
        if (mean := self._recent.value(now)) > limit:
            what = f"requests take {mean:.1f} s on average, and {limit:g} s are allowed (throttle_seconds)"
            raise self._too_busy(what, "throttled")

    def _full(self) -> str:
        limits, queued = self._admission.queue_limits, self._admission.queued
        return (
            f"the queue is full: {queued} requests of {self._admission.queued_tokens} tokens wait, and "
            f"{limits.requests} (max_queued_requests) of {limits.tokens} (max_queued_tokens) may"
        )

    def _too_busy(self, what: str, code: str) -> ApiError:
        rounds = (self._admission.queued + 1) / self._admission.slots
        seconds = min(_LONGEST_ADVICE, math.ceil(rounds * self._service_seconds))
        return ApiError(429, f"{what}; try again in {seconds} s", code, retry_after=seconds)


class RecentMean:
    """The mean of the values of the last seconds; 0 without values."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))
        self._sum += value
        self._forget(now)

    def value(self, now: float) -> float:
        self._forget(now)
        return self._sum / len(self._values) if self._values else 0.0

    def _forget(self, now: float) -> None:
        while self._values and self._values[0][0] <= now - self._seconds:
            self._sum -= self._values.popleft()[1]


def stopping() -> ApiError:
    """Return the error for requests that a stopping server does not take."""
    return ApiError(503, "the server is stopping; try another one", "stopping", retry_after=5)


def down() -> ApiError:
    """Return the error for requests while no replica works."""
    return ApiError(503, "the engine does not answer; try again", "engine_dead", retry_after=5)

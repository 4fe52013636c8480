"""Who may go to the engine, and when: first come first served, within the engine's batch and KV cache.

The module knows no clock, no threads and no network; `gate.py` brings it to asyncio.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Capacity:
    """What one replica runs at once."""

    requests: int
    tokens: int


@dataclass(frozen=True)
class QueueLimits:
    """What may wait in front of all replicas."""

    requests: int
    tokens: int


@dataclass(eq=False)
class Ticket:
    """One sequence's claim; `tokens` are its prompt and what is reserved for its answer."""

    tokens: int


@dataclass
class _Replica:
    up: bool = True
    running: dict[Ticket, None] = field(default_factory=dict)
    tokens: int = 0


class QueueFull(Exception):
    """Nothing of an arrival was taken in."""


class Admission:
    """Bounds what runs and what waits.

    No ticket overtakes another: a long request at the head waits for room and all others wait behind it. A head that
    fits on several replicas goes to the one with the fewest tokens to do.

    Attributes:
        queued_tokens: tokens of those who wait.
    """

    def __init__(self, replicas: int, capacity: Capacity, queue: QueueLimits) -> None:
        self.capacity = capacity
        self.queue_limits = queue
        self.queued_tokens = 0
        self._replicas = [_Replica() for _ in range(replicas)]
        self._queue: OrderedDict[Ticket, None] = OrderedDict()

    @property
    def in_flight(self) -> int:
        return sum(len(replica.running) for replica in self._replicas)

    @property
    def in_flight_tokens(self) -> int:
        return sum(replica.tokens for replica in self._replicas)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def slots(self) -> int:
        """Requests that all replicas run at once."""
        return self.capacity.requests * len(self._replicas)

    @property
    def any_up(self) -> bool:
        return any(replica.up for replica in self._replicas)

    def has_room_when_idle(self, tickets: Sequence[Ticket]) -> bool:
        """Whether tickets that come together would all be taken in if nobody else were there."""
        try:
            Admission(len(self._replicas), self.capacity, self.queue_limits).arrive(tickets)
        except QueueFull:
            return False
        return True

    def arrive(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, int]]:
        """Take in tickets that come together; returns those that may run now, with their replica's number.

        Raises:
            QueueFull: if not all of them can run or wait.
        """
        if any(ticket.tokens > self.capacity.tokens for ticket in tickets):
            raise QueueFull  # it would wait for ever, and all others behind it
        for ticket in tickets:
            self._queue[ticket] = None
            self.queued_tokens += ticket.tokens
        admitted = self.admit()
        full = self.queued > self.queue_limits.requests or self.queued_tokens > self.queue_limits.tokens
        if full and any(ticket in self._queue for ticket in tickets):
            for ticket in tickets:  # they were last: nobody was admitted because of them
                self.leave(ticket)
            raise QueueFull
        return admitted

    def admit(self) -> list[tuple[Ticket, int]]:
        """Let in who may run now, with their replica's number."""
        admitted = []
        while self._queue:
            ticket = next(iter(self._queue))
            number = self._free_replica(ticket)
            if number is None:
                break
            self._forget(ticket)
            replica = self._replicas[number]
            replica.running[ticket] = None
            replica.tokens += ticket.tokens
            admitted.append((ticket, number))
        return admitted

    def leave(self, ticket: Ticket) -> None:
        """Give up a place in the queue or in the batch; nothing happens when it holds none."""
        if ticket in self._queue:
            self._forget(ticket)
        for replica in self._replicas:
            if ticket in replica.running:
                del replica.running[ticket]
                replica.tokens -= ticket.tokens

    def grow(self, ticket: Ticket, tokens: int) -> None:
        """Count more tokens for a ticket that runs; those that wait have room later."""
        for replica in self._replicas:
            if ticket in replica.running:
                ticket.tokens += tokens
                replica.tokens += tokens

    def set_up(self, number: int, up: bool) -> None:
        """Whether a replica takes requests."""
        self._replicas[number].up = up

    def _forget(self, ticket: Ticket) -> None:
        del self._queue[ticket]
        self.queued_tokens -= ticket.tokens

    def _free_replica(self, ticket: Ticket) -> int | None:
        free = [
            number
            for number, replica in enumerate(self._replicas)
            if replica.up
            and len(replica.running) < self.capacity.requests
            and replica.tokens + ticket.tokens <= self.capacity.tokens
        ]
        return min(free, key=lambda number: (self._replicas[number].tokens, number), default=None)

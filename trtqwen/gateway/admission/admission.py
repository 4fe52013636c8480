"""Who may go to the engine, and when: first come first served, within the engine's batch and KV cache.

The module knows no clock, no threads and no network; `gate.py` brings it to asyncio.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

_BOUND = 1.25  # times the mean load, beyond which a replica is loaded
_TOKENS_A_PREFIX = 32  # of the KV cache: as many beginnings are remembered as it has blocks of this size


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
    """One sequence's claim.

    Attributes:
        tokens: its prompt and what is reserved for its answer.
        arrived: when it came, in seconds of the caller's clock.
        prefixes: what its prompt begins with, as hashes from the shortest beginning to the longest; see `prefix.py`.
    """

    tokens: int
    arrived: float = 0.0
    prefixes: tuple[int, ...] = ()


@dataclass
class _Replica:
    up: bool = True
    running: dict[Ticket, None] = field(default_factory=dict)
    tokens: int = 0
    known: OrderedDict[int, None] = field(default_factory=OrderedDict)  # beginnings sent there, the latest last

    def matched(self, prefixes: Sequence[int]) -> int:
        """How many beginnings of a prompt it has read, counted up to the longest that it knows."""
        return next((count for count in range(len(prefixes), 0, -1) if prefixes[count - 1] in self.known), 0)

    def learn(self, prefixes: Sequence[int], limit: int) -> None:
        """Remember a prompt's beginnings in place of those used least recently."""
        for prefix in prefixes:
            self.known[prefix] = None
            self.known.move_to_end(prefix)
        while len(self.known) > limit:
            self.known.popitem(last=False)


class QueueFull(Exception):
    """Nothing of an arrival was taken in."""


class Admission:
    """Bounds what runs and what waits.

    No ticket overtakes another: a long request at the head waits for room and all others wait behind it. A head that
    fits on several replicas goes to the one with the fewest tokens to do.

    A head with prefixes goes to the replica that has read most of its beginning, unless that one is loaded: it has
    more than `_BOUND` times the mean of tokens or requests, and more than a quarter of what it can run. A beginning
    that no replica has read goes to one with at most the mean load, chosen by the hash of the beginning, so that
    several gateways choose the same one (consistent hashing with bounded loads, Mirrokni et al. 2018, by rendezvous
    hashing).

    Attributes:
        queued_tokens: tokens of those who wait.
    """

    def __init__(self, replicas: int, capacity: Capacity, queue: QueueLimits) -> None:
        self._memory = max(1024, capacity.tokens // _TOKENS_A_PREFIX)
        self.capacity = capacity
        self.queue_limits = queue
        self.queued_tokens = 0
        self._replicas = [_Replica() for _ in range(replicas)]
        self._queue: OrderedDict[Ticket, None] = OrderedDict()

    @property
    def replicas(self) -> int:
        return len(self._replicas)

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
    def oldest(self) -> Ticket | None:
        """The ticket that has waited longest."""
        return next(iter(self._queue), None)

    def running(self, number: int) -> tuple[int, int]:
        """Sequences on a replica, and their tokens."""
        replica = self._replicas[number]
        return len(replica.running), replica.tokens

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
            replica.learn(ticket.prefixes, self._memory)
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
        replica = self._replicas[number]
        replica.up = up
        if not up:
            replica.known.clear()  # when it comes back, its KV cache is empty

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
        if free and ticket.prefixes:
            return self._by_prefix(ticket.prefixes, free)
        return min(free, key=lambda number: (self._replicas[number].tokens, number), default=None)

    def _by_prefix(self, prefixes: Sequence[int], free: Sequence[int]) -> int:
        """The replica for a prompt, out of those with room."""
        up = sum(replica.up for replica in self._replicas)
        mean = Capacity(-(-self.in_flight // up), -(-self.in_flight_tokens // up))

        def loaded(number: int) -> bool:
            replica = self._replicas[number]
            requests = max(_BOUND * mean.requests, self.capacity.requests / 4)
            return len(replica.running) > requests or replica.tokens > max(
                _BOUND * mean.tokens, self.capacity.tokens / 4
            )

        matched = {number: self._replicas[number].matched(prefixes) for number in free if not loaded(number)}
        if longest := max(matched.values(), default=0):
            return min(
                (number for number, count in matched.items() if count == longest),
                key=lambda number: (self._replicas[number].tokens, number),
            )
        calm = [number for number in free if self._replicas[number].tokens <= mean.tokens] or free
        return max(calm, key=lambda number: _weight(prefixes[0], number))


def _weight(prefix: int, replica: int) -> int:
    """Of a replica for a beginning: the largest wins, and a replica that goes takes only its own beginnings along."""
    return xxhash.xxh3_64_intdigest(f"{prefix} {replica}".encode())

"""Admission to the engine: fair between keys, first come first served within a key.

The module has no clock, threads or network; `gate.py` is its interface for asyncio.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import xxhash

_QUANTA = 32  # turns that it takes to admit the longest ticket there can be
_BOUND = 1.25  # times the mean load, beyond which a replica is loaded
_TOKENS_A_PREFIX = 32  # of the KV cache: as many beginnings are remembered as it has blocks of this size


@dataclass(frozen=True)
class Capacity:
    """The capacity of one replica."""

    requests: int
    tokens: int


@dataclass(frozen=True)
class QueueLimits:
    """Limits of the queue in front of all replicas."""

    requests: int
    tokens: int


@dataclass(frozen=True)
class Owner:
    """The owner of tickets: one API key.

    Attributes:
        most_in_flight: sequences that it may have on the engines; None is no limit.
        most_queued: sequences that it may have waiting; None is no limit.
    """

    name: str = ""
    most_in_flight: int | None = None
    most_queued: int | None = None


@dataclass(eq=False)
class Ticket:
    """The ticket of one sequence.

    Attributes:
        tokens: its prompt and what is reserved for its answer.
        owner: the API key of the request.
        arrived: arrival time, in seconds of the caller's clock.
        prefixes: hashes of the prompt's beginnings, from the shortest to the longest; see `prefix.py`.
        priority: an owner's tickets with the lowest number go first.
    """

    tokens: int
    owner: Owner = Owner()
    arrived: float = 0.0
    prefixes: tuple[int, ...] = ()
    priority: int = 0


@dataclass
class _Replica:
    up: bool = True
    running: dict[Ticket, None] = field(default_factory=dict)
    tokens: int = 0
    known: OrderedDict[int, None] = field(default_factory=OrderedDict)  # beginnings sent there, the latest last

    def matched(self, prefixes: Sequence[int]) -> int:
        """Return how many beginnings of a prompt the replica has read, up to the longest known one."""
        return next((count for count in range(len(prefixes), 0, -1) if prefixes[count - 1] in self.known), 0)

    def learn(self, prefixes: Sequence[int], limit: int) -> None:
        """Remember a prompt's beginnings, and forget those used least recently."""
        for prefix in prefixes:
            self.known[prefix] = None
            self.known.move_to_end(prefix)
        while len(self.known) > limit:
            self.known.popitem(last=False)


class QueueFull(Exception):
    """No ticket of an arrival was admitted or queued."""


class Admission:
    """Limits running and waiting tickets.

    Owners take turns by deficit round robin over tokens: each waiting owner gets the same number of tokens admitted,
    regardless of its number of requests. Tickets of one owner and priority never overtake each other. The next ticket
    waits until it fits, and all others wait behind it. A ticket that fits on several replicas goes to the one with
    the fewest outstanding tokens. If the queue is full, an arrival displaces the last tickets of the owner with the
    most waiting tickets.

    A ticket with prefixes goes to the replica that has read the longest beginning of its prompt, unless that replica
    is overloaded: it has more than `_BOUND` times the mean of tokens or requests, and more than a quarter of its
    capacity. If no replica has read the beginning, its hash selects a replica with at most the mean load, so that
    several gateways choose the same one (consistent hashing with bounded loads, Mirrokni et al. 2018, by rendezvous
    hashing).

    Attributes:
        queued: tickets that wait.
        queued_tokens: their tokens.
        pushed_out: tickets that an arrival displaced; the caller informs their clients and clears the list.
    """

    def __init__(self, replicas: int, capacity: Capacity, queue: QueueLimits) -> None:
        self._memory = max(1024, capacity.tokens // _TOKENS_A_PREFIX)
        self.capacity = capacity
        self.queue_limits = queue
        self.queued_tokens = 0
        self._replicas = [_Replica() for _ in range(replicas)]
        self.queued = 0
        self.pushed_out: list[Ticket] = []
        self._waiting: OrderedDict[Owner, OrderedDict[Ticket, None]] = OrderedDict()  # in the order of their turns
        self._deficits: dict[Owner, int] = {}
        self._in_turn: Owner | None = None
        self._running = Counter[Owner]()
        self._quantum = max(1, capacity.tokens // _QUANTA)

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
    def oldest(self) -> Ticket | None:
        """The ticket that has waited longest."""
        waiting = chain.from_iterable(self._waiting.values())
        return min(waiting, key=lambda ticket: ticket.arrived, default=None)

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
        """Return whether tickets that arrive together would all run if there were no others."""
        try:
            Admission(len(self._replicas), self.capacity, self.queue_limits).arrive(tickets)
        except QueueFull:
            return False
        return True

    def has_free_replica(self, tokens: int) -> bool:
        """Return whether a ticket of this many tokens would run immediately."""
        return not self.queued and self._free_replica(Ticket(tokens)) is not None

    def arrive(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, int]]:
        """Admit or queue tickets that arrive together; return those that may run now, with their replica's number.

        Raises:
            QueueFull: if some of them can neither run nor wait.
        """
        if any(ticket.tokens > self.capacity.tokens for ticket in tickets):
            raise QueueFull  # it would wait forever, and all others behind it
        owner = tickets[0].owner
        for ticket in tickets:
            self._deficits.setdefault(owner, 0)
            self._wait(ticket)
            self.queued += 1
            self.queued_tokens += ticket.tokens
        admitted = self.admit()
        mine = self._waiting.get(owner, OrderedDict())
        if any(ticket in mine for ticket in tickets):
            too_many = owner.most_queued is not None and len(mine) > owner.most_queued
            losers = [] if too_many else self._losers(owner, tickets)
            if losers is None or too_many:
                # They have not run: no other was admitted because of them.
                for ticket in tickets:
                    self.leave(ticket)
                raise QueueFull
            for ticket in losers:
                self.leave(ticket)
            self.pushed_out += losers
        return admitted

    def would_refuse(self, owner: Owner, priority: int = 0) -> bool:
        """Whether one more ticket of this owner and priority, however small, has no place to wait."""
        mine = self._waiting.get(owner, OrderedDict())
        if owner.most_queued is not None and len(mine) >= owner.most_queued > 0:
            return True
        if not 0 < self.queue_limits.requests <= self.queued:
            return False
        if mine and next(reversed(mine)).priority > priority:
            return False
        return all(len(mine) + 1 >= len(tickets) for other, tickets in self._waiting.items() if other != owner)

    def admit(self) -> list[tuple[Ticket, int]]:
        """Return the tickets that may run now, with their replica's number."""
        admitted = []
        while (ticket := self._next()) is not None:
            number = self._free_replica(ticket)
            if number is None:
                break
            self._deficits[ticket.owner] -= ticket.tokens
            self._forget(ticket)
            self._running[ticket.owner] += 1
            replica = self._replicas[number]
            replica.running[ticket] = None
            replica.tokens += ticket.tokens
            replica.learn(ticket.prefixes, self._memory)
            admitted.append((ticket, number))
        return admitted

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket from the queue or from its replica; does nothing for other tickets."""
        if ticket in self._waiting.get(ticket.owner, ()):
            self._forget(ticket)
        for replica in self._replicas:
            if ticket in replica.running:
                del replica.running[ticket]
                replica.tokens -= ticket.tokens
                self._running[ticket.owner] -= 1
                if not self._running[ticket.owner]:
                    del self._running[ticket.owner]

    def grow(self, ticket: Ticket, tokens: int) -> None:
        """Count more tokens for a running ticket."""
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

    def _wait(self, ticket: Ticket) -> None:
        """Insert a ticket behind its owner's tickets that go first."""
        mine = self._waiting.setdefault(ticket.owner, OrderedDict())
        overtaken = bool(mine) and next(reversed(mine)).priority > ticket.priority
        mine[ticket] = None
        if overtaken:
            for later in [other for other in mine if other.priority > ticket.priority]:
                mine.move_to_end(later)

    def _forget(self, ticket: Ticket) -> None:
        mine = self._waiting[ticket.owner]
        del mine[ticket]
        if not mine:
            del self._waiting[ticket.owner], self._deficits[ticket.owner]
            if self._in_turn == ticket.owner:
                self._in_turn = None
        self.queued -= 1
        self.queued_tokens -= ticket.tokens

    def _next(self) -> Ticket | None:
        """The ticket whose turn it is, the same until it is admitted or leaves."""
        if all(map(self._at_limit, self._waiting)):
            return None
        while True:
            owner = next(iter(self._waiting))
            ticket = next(iter(self._waiting[owner]))
            if not self._at_limit(owner):
                if self._deficits[owner] >= ticket.tokens:
                    return ticket
                if owner is not self._in_turn:
                    self._in_turn = owner
                    self._deficits[owner] += self._quantum
                    continue
            self._in_turn = None
            self._waiting.move_to_end(owner)

    def _at_limit(self, owner: Owner) -> bool:
        return owner.most_in_flight is not None and self._running[owner] >= owner.most_in_flight

    def _losers(self, arriving: Owner, arrivals: Sequence[Ticket]) -> list[Ticket] | None:
        """Return the tickets to remove so that the queue is within its limits; None if these include an arrival."""
        requests, tokens = self.queued, self.queued_tokens
        waiting = {owner: list(tickets) for owner, tickets in self._waiting.items()}
        losers: list[Ticket] = []
        while requests > self.queue_limits.requests or tokens > self.queue_limits.tokens:
            sizes = {owner: sum(ticket.tokens for ticket in tickets) for owner, tickets in waiting.items()}
            owner = max(sizes, key=lambda owner: (sizes[owner], owner == arriving))
            ticket = waiting[owner].pop()
            if ticket in arrivals:
                return None
            losers.append(ticket)
            requests, tokens = requests - 1, tokens - ticket.tokens
        return losers

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
    """Return the weight of a replica for a beginning; the largest wins.

    If a replica is removed, only its own beginnings move to other replicas.
    """
    return xxhash.xxh3_64_intdigest(f"{prefix} {replica}".encode())

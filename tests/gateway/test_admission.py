"""Admission: never more than the batch and the cache, never out of turn, nothing lost, whatever happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trtqwen.gateway.admission.admission import Admission, Capacity, Owner, QueueFull, QueueLimits, Ticket

REQUESTS, TOKENS, LARGEST = 3, 100, 80
QUEUE = QueueLimits(requests=5, tokens=150)


class AdmissionMachine(RuleBasedStateMachine):
    """Arrivals, ends, cancellations and failing replicas in any order, beside a list that remembers who is where."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(2, Capacity(REQUESTS, TOKENS), QUEUE)
        self.waiting: list[Ticket] = []
        self.running: list[tuple[Ticket, int]] = []
        self.up = [True, True]

    def note(self, admitted: list[tuple[Ticket, int]]) -> None:
        for ticket, replica in admitted:
            assert ticket is self.waiting.pop(0), "somebody overtook"
            assert self.up[replica]
            self.running.append((ticket, replica))

    @rule(sizes=st.lists(st.integers(1, LARGEST), min_size=1, max_size=3))
    def arrive(self, sizes: list[int]) -> None:
        tickets = [Ticket(size) for size in sizes]
        before = self.admission.queued, self.admission.in_flight, self.admission.queued_tokens
        self.waiting += tickets
        try:
            self.note(self.admission.arrive(tickets))
        except QueueFull:
            self.waiting = [ticket for ticket in self.waiting if ticket not in tickets]
            assert before == (self.admission.queued, self.admission.in_flight, self.admission.queued_tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        ticket, replica = data.draw(st.sampled_from(self.running))
        self.running.remove((ticket, replica))
        self.admission.leave(ticket)
        self.admission.leave(ticket)
        self.note(self.admission.admit())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.admission.leave(ticket)
        self.note(self.admission.admit())

    @rule(replica=st.integers(0, 1), up=st.booleans())
    def change(self, replica: int, up: bool) -> None:
        self.up[replica] = up
        self.admission.set_up(replica, up)
        self.note(self.admission.admit())

    @invariant()
    def within_limits(self) -> None:
        for number in range(2):
            mine = [ticket.tokens for ticket, replica in self.running if replica == number]
            assert len(mine) <= REQUESTS
            assert sum(mine) <= TOKENS
        assert self.admission.queued == len(self.waiting) <= QUEUE.requests
        assert self.admission.queued_tokens == sum(ticket.tokens for ticket in self.waiting) <= QUEUE.tokens
        assert self.admission.in_flight == len(self.running)
        assert self.admission.in_flight_tokens == sum(ticket.tokens for ticket, _ in self.running)

    @invariant()
    def nobody_waits_without_need(self) -> None:
        if self.waiting:
            head = self.waiting[0].tokens
            for number in range(2):
                mine = [ticket.tokens for ticket, replica in self.running if replica == number]
                assert not self.up[number] or len(mine) == REQUESTS or sum(mine) + head > TOKENS

    def teardown(self) -> None:
        for ticket, _ in self.running:
            self.admission.leave(ticket)
        for ticket in self.waiting:
            self.admission.leave(ticket)
        assert (self.admission.in_flight, self.admission.in_flight_tokens) == (0, 0)
        assert (self.admission.queued, self.admission.queued_tokens) == (0, 0)


TestAdmission = AdmissionMachine.TestCase


def tickets(owner: str, *sizes: int, **limits: int) -> list[Ticket]:
    return [Ticket(size, Owner(owner, **limits)) for size in sizes]


def turns(admission: Admission, running: list[Ticket]) -> Iterator[Ticket]:
    """End what runs, one after the other, and say who comes next."""
    while running:
        admission.leave(running.pop(0))
        for ticket, _ in admission.admit():
            running.append(ticket)
            yield ticket


def test_owners_get_the_same_tokens_however_many_requests_they_send() -> None:
    admission = Admission(1, Capacity(1, 1000), QueueLimits(1000, 100_000))
    [(first, _)] = admission.arrive(tickets("flood", *[100] * 200))
    admission.arrive(tickets("other", *[50] * 20))
    tokens = Counter[str]()
    for ticket in turns(admission, [first]):
        tokens[ticket.owner.name] += ticket.tokens
        if tokens["other"] == 1000:
            break
    assert tokens["flood"] <= 1000 + 100 + 1000 // 32


def test_an_arrival_takes_the_place_of_the_newest_of_who_has_most() -> None:
    admission = Admission(1, Capacity(1, 100), QueueLimits(4, 1000))
    flood = tickets("flood", 10, 10, 10, 10, 10)
    admission.arrive(flood)
    assert admission.would_refuse(Owner("flood"))
    assert not admission.would_refuse(Owner("other"))
    with pytest.raises(QueueFull):
        admission.arrive(tickets("flood", 1))
    mine = tickets("other", 10)
    assert admission.arrive(mine) == []
    assert admission.pushed_out == [flood[-1]]
    assert (admission.queued, admission.queued_tokens) == (4, 40)


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 20)), min_size=1, max_size=30))
def test_the_lowest_priority_of_a_key_goes_first(asked: list[tuple[int, int]]) -> None:
    admission = Admission(1, Capacity(1, 100), QueueLimits(1000, 10_000))
    [running] = [ticket for ticket, _ in admission.arrive([Ticket(100)])]
    waiting = [Ticket(tokens, priority=priority) for priority, tokens in asked]
    for ticket in waiting:
        assert admission.arrive([ticket]) == []
    served = []
    for _ in waiting:
        admission.leave(running)
        [(running, _)] = admission.admit()
        served.append(running)
    assert served == sorted(waiting, key=lambda ticket: ticket.priority)


def test_a_full_queue_lets_the_lowest_priority_of_a_key_go() -> None:
    admission = Admission(1, Capacity(1, 100), QueueLimits(2, 1000))
    admission.arrive([Ticket(10)])
    late, usual = Ticket(10, priority=5), Ticket(10)
    for ticket in (late, usual):
        admission.arrive([ticket])
    assert admission.would_refuse(Owner(), 5)
    assert not admission.would_refuse(Owner(), 4)
    with pytest.raises(QueueFull):
        admission.arrive([Ticket(10, priority=5)])
    admission.arrive([Ticket(10, priority=-1)])
    assert admission.pushed_out == [late]


def test_a_key_s_own_limits_hold() -> None:
    admission = Admission(1, Capacity(10, 1000), QueueLimits(100, 10_000))
    mine = tickets("a", 1, 1, 1, most_in_flight=2, most_queued=1)
    assert len(admission.arrive(mine)) == 2
    with pytest.raises(QueueFull):
        admission.arrive(tickets("a", 1, most_in_flight=2, most_queued=1))
    assert len(admission.arrive(tickets("b", 1))) == 1  # not behind who waits for its own
    admission.leave(mine[0])
    assert [ticket for ticket, _ in admission.admit()] == [mine[2]]


def test_a_ticket_goes_to_the_replica_with_the_fewest_tokens_to_do() -> None:
    admission = Admission(3, Capacity(10, 100), QUEUE)
    sizes = [50, 20, 30, 5, 5, 40]
    places = [admission.arrive([Ticket(size)])[0][1] for size in sizes]
    assert places == [0, 1, 2, 1, 1, 1]  # 20, 25 and 30 are less than replica 2's 30 or replica 0's 50


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_all_who_are_taken_in_get_their_turn_in_order(sizes: list[int]) -> None:
    admission = Admission(1, Capacity(2, 30), QueueLimits(1000, 10000))
    tickets = [Ticket(size) for size in sizes]
    served = []
    running = [ticket for ticket, _ in admission.arrive(tickets)]
    while running:
        served.append(running.pop(0))
        admission.leave(served[-1])
        running += [ticket for ticket, _ in admission.admit()]
    assert served == tickets


def test_an_arrival_is_taken_in_whole_or_not_at_all() -> None:
    admission = Admission(1, Capacity(1, 100), QueueLimits(requests=1, tokens=100))
    with pytest.raises(QueueFull):
        admission.arrive([Ticket(1), Ticket(1), Ticket(1)])
    assert (admission.in_flight, admission.queued) == (0, 0)
    assert len(admission.arrive([Ticket(1), Ticket(1)])) == 1


def test_what_no_wait_makes_fit_is_known_at_once() -> None:
    admission = Admission(2, Capacity(1, 100), QueueLimits(requests=1, tokens=50))
    admission.arrive([Ticket(90), Ticket(90)])
    for sizes, fits in [([90], True), ([60, 60, 50], True), ([60, 60, 51], False), ([1] * 4, False), ([101], False)]:
        assert admission.has_room_when_idle([Ticket(size) for size in sizes]) == fits
    assert (admission.in_flight, admission.queued) == (2, 0)

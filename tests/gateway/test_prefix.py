"""Requests go where their beginnings are, and never at the cost of balance."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trtqwen.gateway.admission.admission import Admission, Capacity, QueueLimits, Ticket
from trtqwen.gateway.admission.prefix import prefixes

BLOCK = 16
QUEUE = QueueLimits(10_000, 10**9)


def admission(replicas: int = 4, requests: int = 32, tokens: int = 32 * 1024) -> Admission:
    return Admission(replicas, Capacity(requests, tokens), QUEUE)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(150_000), k=length))


def send(to: Admission, token_ids: tuple[int, ...], answer: int = 100) -> tuple[Ticket, int]:
    ticket = Ticket(len(token_ids) + answer, prefixes=prefixes(token_ids, BLOCK))
    [(_, number)] = to.arrive([ticket])
    return ticket, number


@given(st.lists(st.integers(0, 5), max_size=300), st.lists(st.integers(0, 5), max_size=300))
def test_equal_beginnings_have_equal_hashes_and_others_do_not(first: list[int], second: list[int]) -> None:
    one, other = prefixes(first, 4), prefixes(second, 4)
    common = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    common = min(len(first), len(second)) if common is None else common
    lengths = [4 * blocks for blocks in (1, 2, 3, 4, 6, 9, 13, 19, 28, 42, 63)]
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        assert (a == b) == (lengths[place] <= common)
    assert len(one) == sum(length <= len(first) // 4 * 4 for length in lengths)
    assert len(prefixes(range(32_768), 32)) == 17


def test_a_conversation_stays_on_its_replica() -> None:
    gate, turns = admission(), prompt(1, 200)
    ticket, home = send(gate, turns)
    gate.leave(ticket)
    for number in range(8):
        others = [send(gate, prompt(100 + 10 * number + i, 200))[0] for i in range(3)]  # noise on all replicas
        turns += prompt(50 + number, 60)
        ticket, place = send(gate, turns)
        assert place == home
        for each in (ticket, *others):
            gate.leave(each)


def test_a_loaded_replica_sheds_its_beginning_to_others() -> None:
    gate, shared = admission(), prompt(1, 320)
    places = Counter(send(gate, shared + prompt(number + 2, 32))[1] for number in range(64))
    assert len(places) == 4  # one beginning alone uses all replicas
    assert max(places.values()) <= 1.25 * 64 / 4 + 1
    fresh = admission()
    few = Counter(send(fresh, shared + prompt(number + 2, 32))[1] for number in range(8))
    assert len(few) == 1  # a quarter of its batch is no load


def test_prompts_that_share_nothing_spread_evenly() -> None:
    gate = admission()
    places = Counter(send(gate, prompt(number, 300))[1] for number in range(96))
    assert max(places.values()) - min(places.values()) <= 2


def test_gateways_that_know_nothing_of_each_other_choose_the_same_replica() -> None:
    def homes(replicas: int) -> list[int]:
        return [send(admission(replicas), prompt(seed, 64))[1] for seed in range(400)]

    assert homes(4) == homes(4)
    assert all(60 < count < 140 for count in Counter(homes(4)).values())
    moved = sum(old != new for old, new in zip(homes(4), homes(5), strict=True))
    assert moved == sum(new == 4 for new in homes(5))  # a new replica takes its share and moves nothing else


def test_a_replica_that_returns_has_forgotten() -> None:
    gate = admission(2)
    token_ids = prompt(1, 64)
    ticket, home = send(gate, token_ids)
    gate.leave(ticket)
    gate.set_up(home, False)
    ticket, away = send(gate, token_ids)
    assert away != home
    gate.leave(ticket)
    gate.set_up(home, True)
    assert send(gate, token_ids)[1] == away  # it has the blocks now


def test_memory_is_bounded() -> None:
    gate = admission(1, requests=4, tokens=64 * 1024)
    for seed in range(3000):
        gate.leave(send(gate, prompt(seed, 64))[0])
    assert len(gate._replicas[0].known) == 2048


def test_a_short_prompt_goes_to_the_replica_with_the_fewest_tokens() -> None:
    gate = admission(2)
    assert [send(gate, prompt(seed, BLOCK - 1))[1] for seed in range(4)] == [0, 1, 0, 1]

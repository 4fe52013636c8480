from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from trtqwen.gateway.admission.desk import Memory, Share, Turns, body_memory
from trtqwen.gateway.connections import Connections, is_trusted
from trtqwen.gateway.errors import ApiError


def test_values_take_memory_that_their_bytes_do_not_show() -> None:
    text, lists = json.dumps("x" * 99_998).encode(), json.dumps([[]] * 25_000).encode()
    assert len(text) == len(lists) == 100_000
    assert body_memory(lists) > 15 * body_memory(text)


def test_one_key_leaves_memory_to_the_others() -> None:
    memory = Memory(100, 60)
    alice, bob = Share(memory, "alice"), Share(memory, "bob")
    alice.grow(50)
    alice.grow(60)
    with pytest.raises(ApiError) as refused, Share(memory, "alice") as another:
        another.grow(1)
    assert (refused.value.status, refused.value.code) == (429, "too_many_bytes")
    with bob:
        bob.grow(40)
        with pytest.raises(ApiError):
            bob.grow(41)
        bob.grow(40)
    alice.__exit__()
    with pytest.raises(ApiError) as refused:
        bob.grow(61)
    assert refused.value.status == 413
    bob.grow(60)


def test_keys_take_turns_and_the_smallest_of_a_key_is_first() -> None:
    order: list[str] = []

    async def work(turns: Turns, key: str, name: str, size: int) -> None:
        async with turns.turn(key, size):
            order.append(name)
            await asyncio.sleep(0)

    async def main() -> None:
        turns = Turns(1, 1, 60, "a test")
        jobs = [work(turns, "alice", "large", 4000), work(turns, "alice", "larger", 9000)]
        jobs += [work(turns, "alice", "small", 10), work(turns, "bob", "bob", 9000)]
        await asyncio.gather(*jobs)

    asyncio.run(main())
    assert order == ["large", "small", "bob", "larger"]


def test_a_turn_that_is_not_waited_for_any_more_is_not_lost() -> None:
    async def main() -> None:
        turns = Turns(1, 1, 0.05, "a test")
        async with turns.turn("alice", 1):
            cancelled = asyncio.ensure_future(enter(turns, "bob"))
            late = asyncio.ensure_future(enter(turns, "carol"))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(ApiError, match="wait for a test"):
                await late
        await asyncio.wait_for(enter(turns, "bob"), 60)
        assert not turns._waiting
        assert not turns._working.total()

    async def enter(turns: Turns, key: str) -> None:
        async with turns.turn(key, 1):
            pass

    asyncio.run(main())


def test_a_key_rests_as_long_as_it_has_worked() -> None:
    async def main() -> None:
        turns = Turns(2, 1, 60, "a test", rests=True)
        loop = asyncio.get_running_loop()
        async with turns.turn("alice", 1):
            await asyncio.sleep(0.5)
        ended = loop.time()
        began: dict[str, float] = {}

        async def enter(key: str) -> None:
            async with turns.turn(key, 1):
                began[key] = loop.time()

        await asyncio.gather(enter("alice"), enter("bob"))
        assert list(began) == ["bob", "alice"]
        assert began["alice"] - ended >= 0.45

    asyncio.run(main())


class Client:
    """A connection that remembers whether it was closed."""

    def __init__(self) -> None:
        self.held = 0
        self.dropped = False

    def drop(self) -> None:
        self.dropped = True


def test_a_newcomer_takes_the_place_of_the_oldest_idle_connection() -> None:
    limits = Connections(3, 2)
    first, second, third, busy = Client(), Client(), Client(), Client()
    assert limits.enter(first, "10.0.0.1")
    assert limits.enter(second, "10.0.0.1")
    assert limits.enter(third, "10.0.0.1")
    assert (first.dropped, second.dropped) == (True, False)
    limits.leave(first, "10.0.0.1")
    assert limits.enter(busy, "10.0.0.2")
    limits.busy(busy, "10.0.0.2")
    assert limits.enter(Client(), "10.0.0.3")
    assert second.dropped
    assert not busy.dropped
    limits.leave(second, "10.0.0.1")
    limits.busy(third, "10.0.0.1")


def test_connections_that_all_work_are_not_closed() -> None:
    limits = Connections(2, 2)
    clients = [Client(), Client()]
    for client in clients:
        assert limits.enter(client, "::1")
        limits.busy(client, "::1")
    assert not limits.enter(Client(), "10.0.0.1")
    assert not any(client.dropped for client in clients)


def test_unfinished_requests_and_unread_answers_are_bounded() -> None:
    limits = Connections(10_000, 10_000)
    clients = [Client() for _ in range(600)]
    for client in clients:
        limits.hold(client, 32 << 10)
    assert sum(not client.dropped for client in clients) == 512
    assert clients[0].dropped
    limits.release(clients[-1])
    assert clients[-1].held == 0
    readers = [Client() for _ in range(200)]
    for client in readers:
        limits.unread(client)
    assert [client.dropped for client in readers] == [True] * 72 + [False] * 128


@pytest.mark.parametrize(
    ("address", "networks", "trusted"),
    [
        ("10.1.2.3", ("10.0.0.0/8",), True),
        ("11.1.2.3", ("10.0.0.0/8",), False),
        ("2001:db8::1", ("10.0.0.0/8", "2001:db8::/32"), True),
        ("", ("10.0.0.0/8",), False),
        ("evil, 10.0.0.1", ("10.0.0.0/8",), False),
    ],
)
def test_proxies_are_trusted_by_network(address: str, networks: Any, trusted: bool) -> None:
    assert is_trusted(address, networks) == trusted

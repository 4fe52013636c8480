"""Turns for coroutines: cancellations, requests of several answers, and the end of waiting."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

import pytest

from trtqwen.gateway.admission.admission import Admission, Capacity, QueueLimits
from trtqwen.gateway.admission.gate import Gate, RecentMean
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.metrics import Metrics


def gate(requests: int = 1, queue_seconds: float = 5) -> Gate:
    admission = Admission(1, Capacity(requests, 100), QueueLimits(10, 1000))
    return Gate(admission, Metrics(), queue_seconds)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def hold(gate: Gate, count: int, began: list[str], name: str, seconds: float) -> None:
    with gate.places([1] * count) as tickets:
        for ticket in tickets:
            await gate.turn(ticket, math.inf)
            began.append(name)
            await asyncio.sleep(seconds)
            gate.give_back(ticket, seconds)


def test_a_cancellation_that_comes_with_the_turn_counts() -> None:
    """The one that runs and the next one leave together: the turn goes to the one after them."""

    async def test() -> None:
        turns, began = gate(), list[str]()
        first, second, third = (asyncio.create_task(hold(turns, 1, began, name, 0.2)) for name in "abc")
        await asyncio.sleep(0.05)
        assert began == ["a"]
        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled()
        assert second.cancelled()
        await third
        assert began == ["a", "c"]
        assert turns.idle

    run(test)


def test_the_answers_of_one_request_wait_for_each_other() -> None:
    async def test() -> None:
        turns, began = gate(queue_seconds=0.2), list[str]()
        await hold(turns, 4, began, "a", 0.15)  # the last waits for 0.45 s
        assert began == ["a"] * 4
        with turns.places([1]), pytest.raises(ApiError, match=r"no turn came within 0.2 s") as caught:
            await hold(turns, 1, began, "b", 0)
        assert caught.value.status == 429

    run(test)


def test_who_waits_can_be_sent_away() -> None:
    async def test() -> None:
        turns, began = gate(), list[str]()
        runs, waits = (asyncio.create_task(hold(turns, 1, began, name, 0.1)) for name in "ab")
        await asyncio.sleep(0.02)
        turns.send_away(ApiError(503, "stop", "stopping"))
        with pytest.raises(ApiError, match="stop"):
            await waits
        await runs
        assert began == ["a"]
        assert turns.idle

    run(test)


def test_a_request_s_deadline_holds_for_its_waiting_answers_too() -> None:
    async def test() -> None:
        turns = gate()
        with turns.places([1, 1]) as (first, second):
            await turns.turn(first, math.inf)
            with pytest.raises(ApiError, match="not finished in time") as caught:
                await turns.turn(second, time.monotonic() + 0.05)
            assert caught.value.status == 504
            with turns.places([1]) as (other,), pytest.raises(ApiError, match="not finished in time"):
                await turns.turn(other, time.monotonic() + 0.05)  # sooner than queue_seconds
        assert turns.idle

    run(test)


def test_what_never_fits_is_refused_for_good() -> None:
    async def test() -> None:
        turns = gate()
        with pytest.raises(ApiError, match="12 answers of 12 tokens") as caught, turns.places([1] * 12):
            pass
        assert (caught.value.status, caught.value.code, turns.idle) == (400, "too_much", True)

    run(test)


def test_nobody_waits_while_requests_take_too_long() -> None:
    async def test() -> None:
        admission = Admission(1, Capacity(1, 100), QueueLimits(10, 1000))
        turns, began = Gate(admission, Metrics(), 60, (), 0.05), list[str]()
        quick = asyncio.create_task(hold(turns, 1, began, "a", 0.01))
        await asyncio.gather(quick, hold(turns, 1, began, "b", 0.01))  # the mean is low: it may wait
        await hold(turns, 1, began, "c", 0.5)
        running = asyncio.create_task(hold(turns, 1, began, "d", 0.2))  # it need not wait
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="throttle_seconds") as refused:
            await hold(turns, 1, began, "e", 0)
        assert (refused.value.status, refused.value.code) == (429, "throttled")
        await running
        assert began == ["a", "b", "c", "d"]
        assert turns.idle

    run(test)


def test_a_mean_forgets() -> None:
    recent = RecentMean(60)
    assert recent.value(0) == 0
    recent.add(1, 10)
    recent.add(3, 20)
    assert recent.value(69) == 2
    assert recent.value(71) == 3
    assert recent.value(81) == 0

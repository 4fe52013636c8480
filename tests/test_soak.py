"""scripts/soak.py: what it counts as lost, failed or leaking, against servers and processes that do just that."""

from __future__ import annotations

import asyncio
import math
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from subprocess import PIPE

import pytest

from scripts.soak import (
    Away,
    Client,
    End,
    Life,
    Outcome,
    Sample,
    _judge,
    judge_outcomes,
    judge_service,
    look_at,
    slope,
)

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def life(values: list[float], *, descriptors: int = 0, every: float = 10.0, noise: float = 0.0) -> Life:
    draw = random.Random(1)
    samples = [
        Sample(every * number, value + draw.uniform(-noise, noise), 20 + descriptors * number // 10, 8)
        for number, value in enumerate(values)
    ]
    return Life("gateway", 1, samples)


@pytest.mark.parametrize(
    ("values", "leaks"),
    [
        pytest.param([70.0] * 100, False, id="steady"),
        pytest.param([70 + 0.05 * number for number in range(100)], True, id="18 MB/h for 16 minutes"),
        pytest.param([70 + min(8, 0.5 * number) for number in range(100)], False, id="a cache that fills up"),
        pytest.param([70 + 9 * (number % 7 == 0) for number in range(100)], False, id="peaks"),
    ],
)
def test_memory_that_keeps_growing_is_a_leak(values: list[float], leaks: bool) -> None:
    verdict = judge_service([life(values, noise=0.3)], 0.0, leak=10)
    assert bool(verdict.problems) is leaks, verdict


def swings(seed: int, leak: float = 0.0) -> Life:
    """Looks at an allocator for the second half of ten minutes: it swings by 5 MB within half a minute.

    Args:
        leak: MB in an hour.
    """
    draw, swing, alike = random.Random(seed), 0.0, math.exp(-3 / 30)
    samples = [Sample(0.0, 210.0, 20, 8)]
    for number in range(100):
        swing = alike * swing + math.sqrt(1 - alike**2) * draw.gauss(0, 5)
        samples.append(Sample(60 + 3.0 * number, 210 + swing + leak * number * 3 / 3600, 20, 8))
    return Life("gateway", 1, samples)


def test_ten_minutes_tell_a_leak_from_a_swing() -> None:
    def found(leak: float) -> int:
        return sum(bool(judge_service([swings(seed, leak)], 0.0, 20).problems) for seed in range(100))

    assert found(0.0) <= 10
    assert found(360.0) >= 90


def test_memory_that_moves_between_processes_is_no_leak() -> None:
    """One of two gateway processes went from 71 to 86 MB, as clients kept their connections to it."""
    one, other = life([71 + 0.15 * number for number in range(100)]), life([86 - 0.15 * n for n in range(100)])
    assert judge_service([one], 0.0, 20).problems
    verdict = judge_service([one, other], 0.0, 20)
    assert (verdict.problems, verdict.processes, verdict.megabytes) == ((), 2, (157.0, 157.0))


def test_a_process_that_ended_is_not_part_of_the_sum() -> None:
    killed = Life("gateway", 2, life([500.0] * 20).samples)
    assert judge_service([killed, life([70.0] * 100)], 0.0, 20).megabytes == (70.0, 70.0)


def test_a_real_process_that_leaks_slowly_is_found() -> None:
    """It serves eight requests a second and keeps 10 KB of each: 280 MB an hour, 5 MB in a minute."""
    code = "import sys\nkept = []\nfor line in sys.stdin: kept.append(bytearray(b'x' * 80_000)); print(flush=True)"
    steady = Life("steady", os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as process:
        leaking = Life("leaking", process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        for second in range(160):
            print(file=process.stdin, flush=True)
            process.stdout.readline()
            for watched in (leaking, steady):
                sample = look_at(watched.pid, float(second))
                assert sample is not None
                watched.samples.append(sample)
        process.stdin.close()
    assert "memory grows by" in judge_service([leaking], 0.0, 20).problems[0]
    assert judge_service([steady], 0.0, 20).problems == ()


def test_the_slope_ignores_outliers_and_matches_a_straight_line() -> None:
    points = [(float(number), 3.0 * number) for number in range(20)]
    points[7] = (7.0, 900.0)
    assert slope(points) == pytest.approx((3.0, 3.0, 3.0))


def test_the_interval_holds_the_slope_nineteen_times_of_twenty() -> None:
    draw, held = random.Random(2), 0
    for _ in range(400):
        _, low, high = slope([(float(number), 2.0 * number + draw.gauss(0, 5)) for number in range(10)])
        held += low <= 2.0 <= high
    assert held >= 0.93 * 400


def test_descriptors_that_add_up_are_a_leak() -> None:
    assert "descriptors" in judge_service([life([70.0] * 200, descriptors=1)], 0.0, leak=10).problems[0]


def test_a_short_life_is_not_judged() -> None:
    assert judge_service([life([10.0, 90.0, 200.0])], 0.0, leak=1).slope is None


@pytest.mark.parametrize(
    ("answer", "streamed", "end"),
    [
        (CHUNKED + DONE, True, "answered"),
        (CHUNKED + b"5\r\ndata:\r\n", True, "lost"),
        (CHUNKED + b'10\r\ndata: {"error":{}}\r\n0\r\n\r\n', True, "failed"),
        (b'HTTP/1.1 400 \r\ncontent-length: 12\r\n\r\n{"error":{}}', False, "refused"),
        (b'HTTP/1.1 500 \r\ncontent-length: 12\r\n\r\n{"error":{}}', False, "failed"),
        (b'HTTP/1.1 200 \r\ncontent-length: 12\r\n\r\n{"a"', False, "lost"),
        (b"HTTP/1.1 503 \r\ncontent-length: 0\r\n\r\n", False, "lost"),
        (b"", False, "lost"),
    ],
)
def test_how_an_answer_ends(answer: bytes, streamed: bool, end: End) -> None:
    assert _judge(answer, streamed=streamed)[0] == end


def test_only_kills_excuse_failures_and_only_the_gateway_excuses_silence() -> None:
    def outcome(end: End, at: float) -> Outcome:
        return Outcome("stream", end, at, at + 1)

    aways = [Away("rank", 100, 110), Away("gateway", 200, 205)]
    told = [outcome("failed", 105), outcome("lost", 203), outcome("answered", 1)]
    counts, problems = judge_outcomes(told, aways)
    assert (counts["failed"], counts["answered"], counts["lost"], problems) == (2, 1, 0, [])
    for wrong in (outcome("failed", 50), outcome("lost", 105), outcome("hung", 203)):
        counts, problems = judge_outcomes([*told, wrong], aways)
        assert len(problems) == 1, wrong


def outcomes_of(handler: Handler, *, hang: float = 60.0) -> list[Outcome]:
    """How requests of all kinds end at a server that does the same with each."""

    async def run() -> list[Outcome]:
        async with await asyncio.start_server(handler, "127.0.0.1", 0) as server:
            client = Client(server.sockets[0].getsockname()[1], "qwen", hang=hang, seed=3)
            await asyncio.gather(*(client.one() for _ in range(24)))
            return client.outcomes

    return asyncio.run(run())


def test_a_server_that_never_answers_hangs_its_clients() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    ends = [outcome.end for outcome in outcomes_of(silent, hang=0.5)]
    assert len(ends) == 24
    assert ends.count("hung") > 10
    assert "answered" not in ends


def test_a_server_that_closes_loses_requests() -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    outcomes = outcomes_of(closing)
    assert {outcome.end for outcome in outcomes} == {"lost", "left"}
    assert judge_outcomes(outcomes, [])[1]

"""The watch over the replicas goes on, whatever they answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from trtqwen.gateway.admission.admission import Admission, Capacity, QueueLimits
from trtqwen.gateway.admission.gate import Gate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import late
from trtqwen.gateway.generation import health
from trtqwen.gateway.generation.health import Monitor
from trtqwen.gateway.generation.upstream import Replica, Reply
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import load_model
from trtqwen.gateway.state import running


class Odd(Replica):
    """Answers one probe well, the next with nonsense, and so on."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:9")
        self.probes = 0

    async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[Reply, None]:
        self.probes += 1
        if self.probes % 2 == 0:
            raise ValueError("zip() argument 2 is shorter than argument 1")
        yield Reply((1,))


def test_nonsense_is_taken_for_the_replica_s_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        metrics, replica = Metrics(), Odd()
        gate = Gate(Admission(1, Capacity(1, 100), QueueLimits(1, 100)), metrics, 1)
        monitor = Monitor([replica], gate, metrics, probe_seconds=0.2, stall_seconds=1, prompt_tokens_per_second=1000)
        watch, seen = asyncio.create_task(monitor.watch()), [monitor.ready]
        while len(seen) < 5:
            await asyncio.sleep(0.01)
            if seen[-1] != monitor.ready:
                seen.append(monitor.ready)
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        assert seen == [False, True, False, True, False]
        assert [record.message.partition(" (")[0] for record in caplog.records][:3] == [
            "127.0.0.1:9: sent an unexpected response",
            "127.0.0.1:9: works",
            "127.0.0.1:9: sent an unexpected response",
        ]

    asyncio.run(asyncio.wait_for(test(), 60))


class Failing(Replica):
    """Fails at the moment at which its first probe is cancelled."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.asked = asyncio.Event()

    async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[Reply, None]:
        first = not self.asked.is_set()
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if first:
                raise late() from None
            raise
        yield Reply((1,))


def test_an_end_waits_for_no_watch_that_missed_it(engine_repository: Path) -> None:
    async def test() -> None:
        config = GatewayConfig(repository=engine_repository, port=0, probe_seconds=600)
        replicas: list[Failing] = []

        def connect(address: str) -> Failing:
            replicas.append(Failing(address))
            return replicas[-1]

        async with running(config, load_model(engine_repository), None, Metrics(), connect):
            await replicas[0].asked.wait()

    async def ends() -> bool:
        done, _ = await asyncio.wait((asyncio.create_task(test()),), timeout=30)
        return bool(done)

    assert asyncio.run(ends())


class Slow(Replica):
    """Answers a probe after some time; its gateway asks for a token after 0.1 s of silence."""

    def __init__(self, seconds: float) -> None:
        super().__init__("127.0.0.1:9")
        self.seconds = seconds
        self.ended: list[str] = []

    async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[Reply, None]:
        _, _, timeout = arguments
        if self.seconds > timeout:
            await asyncio.sleep(timeout)
            self.ended.append("late")
            raise late()
        await asyncio.sleep(self.seconds)
        self.ended.append("answered")
        self.heard = time.monotonic()
        yield Reply((1,))


@asynccontextmanager
async def watched(*replicas: Replica, stall_seconds: float = 60) -> AsyncIterator[Monitor]:
    """A monitor of replicas that have all worked."""
    metrics = Metrics()
    gate = Gate(Admission(len(replicas), Capacity(1, 100), QueueLimits(1, 100)), metrics, 1)
    monitor = Monitor(
        replicas, gate, metrics, probe_seconds=0.1, stall_seconds=stall_seconds, prompt_tokens_per_second=1000
    )
    task = asyncio.create_task(monitor.watch())
    try:
        yield monitor
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Settings with which no pause of this machine counts as a death."""
    monkeypatch.setattr(health, "_PATIENCE", 36_000)
    return {"stall_seconds": 3600}


def test_the_only_replica_may_be_slow(patient: dict[str, float]) -> None:
    """Each token takes three times as long as the first probe waits: it is asked again, and stays ready."""

    async def test() -> None:
        slow, ready = Slow(0), []
        async with watched(slow, **patient) as monitor:
            await until(lambda: monitor.ready)
            slow.seconds = 0.3
            slow.ended.clear()
            while slow.ended.count("answered") < 2:
                ready.append(monitor.ready)
                await asyncio.sleep(0.01)
        assert slow.ended[:3] == ["late", "late", "answered"]
        assert all(ready)

    run(test())


@pytest.mark.parametrize("settings", [{}, {"stall_seconds": 0.5}])
def test_the_only_replica_is_dead_when_it_stays_silent(settings: dict[str, float]) -> None:
    async def test() -> None:
        hung = Slow(0)
        async with watched(hung, **settings) as monitor:
            await until(lambda: monitor.ready)
            hung.seconds = 3600
            begun = time.monotonic()
            await until(lambda: not monitor.ready)
            assert time.monotonic() - begun > 0.9 * settings.get("stall_seconds", 1)
            hung.seconds = 0
            await until(lambda: monitor.ready)

    run(test())


def test_a_silent_replica_is_taken_out_at_once_while_another_works(patient: dict[str, float]) -> None:
    async def test() -> None:
        steady, hung = Slow(0), Slow(0)
        async with watched(steady, hung, **patient) as monitor:
            await until(lambda: monitor._up == [True, True])
            hung.ended.clear()
            hung.seconds = 3600
            await until(lambda: monitor._up == [True, False])
            assert hung.ended.count("late") == 1
            steady.seconds = 3600  # now the last one: it may be slow
            await until(lambda: steady.ended.count("late") >= 2)
            assert monitor._up == [True, False]

    run(test())

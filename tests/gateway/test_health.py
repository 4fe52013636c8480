"""The watch over the replicas goes on, whatever they answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import pytest

from trtqwen.gateway.admission.admission import Admission, Capacity, QueueLimits
from trtqwen.gateway.admission.gate import Gate
from trtqwen.gateway.generation.health import Monitor
from trtqwen.gateway.generation.upstream import Replica, Reply
from trtqwen.gateway.metrics import Metrics


class Odd(Replica):
    """Answers one probe well, the next with nonsense, and so on."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:9")
        self.probes = 0

    async def generate(self, *arguments: Any) -> AsyncGenerator[Reply, None]:
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

"""What waits in front of the engine: hundreds of connections at once, and the requests of one key by priority."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import Running, access_log
from tests.gateway.test_limits import busy
from tests.waiting import wait_for

pytestmark = pytest.mark.triton


def test_five_hundred_connections_at_once_wait_their_turn(obedient: Running) -> None:
    body = json.dumps({"model": "qwen", "prompt": "hello", "max_tokens": 8}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", obedient.gateway.config.port)
        writer.write(request)
        try:
            return (await reader.read()).split(b"\r\n", 1)[0]
        finally:
            writer.close()

    async def run() -> list[bytes]:
        return await asyncio.gather(*(ask() for _ in range(500)))

    assert Counter(asyncio.run(run())) == {b"HTTP/1.1 200 OK": 500}  # the engine runs 16 of them at a time


def test_the_lowest_priority_goes_first(another_gateway: Callable[..., Running], tmp_path: Path) -> None:
    with access_log(tmp_path / "access.log") as entries:
        target = another_gateway(kv_cache_tokens=470, access_log=True)  # room for one such request
        order = [("last", 7), ("second", 0), ("first", -3), ("third", 0)]

        def served() -> list[str]:
            return [line["request_id"] for line in entries() if line["status"] == 200]

        def ask(name: str, priority: int) -> Any:
            body = {"model": "qwen", "messages": [{"role": "user", "content": "/again 100 a"}], "max_tokens": 400}
            return target.post("/v1/chat/completions", body | {"priority": priority}, {"X-Request-Id": name})

        def waiting(count: int) -> bool:
            return target.metric("trtqwen_gateway_queued") == count

        with ThreadPoolExecutor(len(order)) as pool:
            with busy(target):
                asked = []
                for count, (name, priority) in enumerate(order):
                    asked.append(pool.submit(ask, name, priority))
                    assert wait_for(partial(waiting, count + 1))
            assert [answer.result()[0] for answer in asked] == [200] * 4
        assert wait_for(lambda: len(served()) == 4)
        assert served() == ["first", "second", "third", "last"]

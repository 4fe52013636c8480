"""Several workers behind one port: limits, rates, metrics and the stop are those of one gateway."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import Running, quick_gateway
from tests.processes import children, fork
from tests.waiting import wait_for
from trtqwen.diagnostics import ServerError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.listener import bind
from trtqwen.gateway.workers import run_workers
from trtqwen.system.processes import runs
from trtqwen.triton.server import TritonServer

pytestmark = pytest.mark.triton
ALICE, BOB = "sk-alice-0123456789", "sk-bob-01234567890"
KEYS = f"keys:\n  - {{name: alice, key: {ALICE}}}\n  - {{name: bob, key: {BOB}, requests_per_minute: 5}}\n"
WORKERS = 3


@pytest.fixture(scope="module")
def shared(
    stand_in_repository: Path, stand_in_triton: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(KEYS)
    limits = {"kv_cache_tokens": 470, "max_tokens": 460, "max_queued_requests": 1, "queue_seconds": 3}
    settings: dict[str, Any] = {"api_keys": keys, "workers": WORKERS, **limits}
    with quick_gateway(stand_in_triton, stand_in_repository, **settings) as running:
        yield replace(running, key=ALICE)


def workers(running: Running) -> list[int]:
    """Process ids of the gateway's workers."""
    return children(running.gateway.pid)


def ended(pid: int) -> bool:
    return not runs(pid)


def together(count: int, ask: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


def test_a_rate_is_one_over_all_workers(shared: Running) -> None:
    bob = replace(shared, key=BOB)
    statuses = together(12, lambda _: bob.ask("hello", max_tokens=2)[0])
    assert Counter(statuses) == {200: 5, 429: 7}
    assert bob.ask("hello", max_tokens=2)[2]["error"]["code"] == "rate_limit_exceeded"


def test_the_queue_is_one_over_all_workers(shared: Running) -> None:
    """One answer takes up nearly the whole cache and one may wait, whichever workers they come to."""
    with ExitStack() as connections, ThreadPoolExecutor(9) as pool:
        sockets = [connections.enter_context(shared.connect()) for _ in range(9)]
        asking = [pool.submit(hang, connection) for connection in sockets]
        wait_for(lambda: sum(one.done() for one in asking) == 8)
        for connection in sockets:
            with suppress(OSError):  # the server has closed it
                connection.shutdown(socket.SHUT_RDWR)
        codes = Counter(one.result() for one in asking)
    assert codes == {"queue_full": 7, "queue_timeout": 1, "hangs": 1}
    assert wait_for(lambda: shared.metric("trtqwen_gateway_in_flight") == 0)


def hang(connection: socket.socket) -> str:
    """Why a request that hangs ended: refused, or it was given up on."""
    body = {"model": "qwen", "messages": [{"role": "user", "content": "/hang"}], "max_tokens": 440}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
    head += f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.settimeout(None)
    connection.sendall(head.encode() + content)
    answer = b""
    while part := connection.recv(65536):
        answer += part
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]) if answer else "hangs"


def test_metrics_are_one_over_all_workers(shared: Running) -> None:
    before = shared.metric("trtqwen_gateway_request_seconds_count")
    assert together(12, lambda _: shared.ask("hello", max_tokens=2)[0]) == [200] * 12
    assert {shared.metric("trtqwen_gateway_request_seconds_count") for _ in range(9)} == {before + 12}
    assert shared.metric("trtqwen_gateway_replica_up") == 1


def test_every_worker_serves(shared: Running) -> None:
    assert len(workers(shared)) == WORKERS


def replaced(running: Running, old: int) -> bool:
    return not runs(old) and len(workers(running)) == 2


def test_a_worker_that_ends_is_replaced_and_a_stop_finishes_what_runs_in_every_one(another_gateway: Any) -> None:
    running = another_gateway(workers=2)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        old, other = workers(running)
        os.kill(old, number)
        assert wait_for(partial(replaced, running, old), 60)
        assert other in workers(running)
        assert wait_for(lambda: together(4, lambda _: running.ask("hello", max_tokens=2)[0]) == [200] * 4, 60)
        running.gateway.check()
    pids = workers(running)

    def ask(number: int) -> int:
        return int(running.ask("hello", max_tokens=400)[0])

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, number) for number in range(6)]
        assert wait_for(lambda: running.metric("trtqwen_gateway_in_flight") == 6 or all(a.done() for a in answers))
        assert running.gateway.stop() == 0
        assert [answer.result() for answer in answers] == [200] * 6
    assert not any(map(runs, pids))


@pytest.fixture
def sleeping_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that only sleep, and never set a handler."""
    program = tmp_path / "worker"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.usefixtures("sleeping_workers")
def test_a_stop_while_workers_start_is_no_failure(stand_in_repository: Path) -> None:
    config = GatewayConfig(repository=stand_in_repository, port=0)
    with bind(config) as listener:
        first = fork(lambda: run_workers(config, listener, 2))
        assert wait_for(lambda: len(children(first)) == 2)
        os.kill(first, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0


@pytest.mark.usefixtures("sleeping_workers")
def test_workers_that_are_killed_again_and_again_end_the_gateway(stand_in_repository: Path) -> None:
    """Four are replaced; the fifth within two minutes ends everything."""
    config = GatewayConfig(repository=stand_in_repository, port=0)
    listener = bind(config)

    def serve() -> None:
        with pytest.raises(ServerError, match="a gateway worker was ended by SIGKILL"):
            run_workers(config, listener, 2)

    first = fork(serve)
    try:
        for killed in range(5):
            assert wait_for(lambda: len(children(first)) == 2), killed
            old, other = children(first)
            os.kill(old, signal.SIGKILL)
            assert wait_for(partial(ended, old))
        assert wait_for(partial(ended, first))
        assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
        assert not runs(other)
    finally:
        listener.close()
        with suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)


def test_the_end_of_the_first_process_ends_the_workers(another_gateway: Any) -> None:
    running = another_gateway(workers=2)
    pids = workers(running)
    os.kill(running.gateway.pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(runs, pids)))

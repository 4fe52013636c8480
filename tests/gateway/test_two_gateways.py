"""Four replicas, two gateways: the rates of keys hold across both, and each death is the death of its own streams."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import Running, quick_gateway, quick_triton
from tests.gateway.deaths import Streams
from tests.gateway.test_rates import Server
from tests.slow import SLOW
from tests.waiting import wait_for
from trtqwen.triton.server import TritonServer

# Limits across gateways are also in test_rates, and deaths in test_life and test_replicas.
pytestmark = [pytest.mark.triton, SLOW]
ALICE, BOB = "sk-alice-0123456789", "sk-bob-01234567890"
REPLICAS, STREAMS, RATE = 4, 8, 6


@pytest.fixture
def site(unhurried_repository: Path, tmp_path: Path) -> Iterator[tuple[list[TritonServer], list[Running]]]:
    """The Tritons, and the gateways in front of all of them."""
    keys = tmp_path / "keys.yaml"
    limited = f"{{name: bob, key: {BOB}, requests_per_minute: {RATE}}}"
    keys.write_text(f"keys:\n- {{name: alice, key: {ALICE}}}\n- {limited}\n")
    rates = Server(tmp_path)
    with ExitStack() as stack:
        stack.callback(rates.stop)
        with ThreadPoolExecutor(REPLICAS) as pool:
            starting = [quick_triton(unhurried_repository) for _ in range(REPLICAS)]
            tritons = list(pool.map(stack.enter_context, starting))
        settings: dict[str, Any] = {
            "triton": tuple(triton.grpc_url for triton in tritons),
            "api_keys": keys,
            "rates_url": rates.url,
            "probe_seconds": 1.5,
            "key_share": 1.0,
        }
        gateways = [
            replace(stack.enter_context(quick_gateway(tritons[0], unhurried_repository, **settings)), key=ALICE)
            for _ in range(2)
        ]
        for gateway in gateways:
            await_replicas(gateway, REPLICAS)
        yield tritons, gateways


def await_replicas(gateway: Running, count: int) -> None:
    assert wait_for(lambda: gateway.metric("trtqwen_gateway_replica_up") == count)


def on_replica(gateway: Running, triton: TritonServer) -> int:
    """Sequences of a gateway on one replica."""
    lines = gateway.get("/metrics")[1].splitlines()
    start = f'trtqwen_gateway_replica_in_flight{{replica="{triton.grpc_url}"}}'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(start))


def test_limits_hold_across_gateways_and_deaths_stay_apart(site: tuple[list[TritonServer], list[Running]]) -> None:
    tritons, gateways = site
    bobs = [replace(gateway, key=BOB) for gateway in gateways]
    with ThreadPoolExecutor(2 * RATE) as pool:
        statuses = list(pool.map(lambda number: bobs[number % 2].ask("hi", max_tokens=1)[0], range(2 * RATE)))
    assert sorted(statuses) == [200] * RATE + [429] * RATE
    for gateway in gateways:
        assert gateway.ask("hi", max_tokens=1)[0] == 200

    # A replica dies: as many streams end as were on it, whichever gateway they came through.
    with ThreadPoolExecutor(2) as pool:
        streams = list(pool.map(lambda gateway: Streams(gateway, STREAMS), gateways))
    doomed = [on_replica(gateway, tritons[3]) for gateway in gateways]
    assert min(doomed) > 0
    os.killpg(tritons[3].pid, signal.SIGKILL)
    for part in streams:
        part.join()
    assert [sum(error is not None for error in part.errors) for part in streams] == doomed
    for gateway in gateways:
        await_replicas(gateway, REPLICAS - 1)

    # A gateway dies: the other one's streams are whole.
    with ThreadPoolExecutor(2) as pool:
        own, others = pool.map(lambda gateway: Streams(gateway, STREAMS), gateways)
    os.kill(gateways[0].gateway.pid, signal.SIGKILL)
    others.join()
    own.join()
    whole = gateways[1].chat("/again 400 ab", max_tokens=450).choices[0].message.content
    assert others.errors == [None] * STREAMS
    assert others.texts == [whole] * STREAMS
    assert all(error is not None for error in own.errors)

"""Two Tritons behind one gateway: the load is spread, and the death of one is the death of its own answers only."""

from __future__ import annotations

import os
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gateway.conftest import quick_gateway, quick_triton
from tests.gateway.deaths import Streams
from tests.waiting import wait_for
from trtqwen.triton.server import TritonServer

pytestmark = pytest.mark.triton
PROBE = 1.5  # seconds


def executions(server: TritonServer) -> int:
    """Requests that a Triton's engine has taken."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    name = 'nv_inference_request_success{model="tensorrt_llm",version="1"}'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


@pytest.mark.slow
def test_one_of_two_dies_and_returns(unhurried_repository: Path) -> None:
    repository = unhurried_repository
    with quick_triton(repository) as steady, quick_triton(repository) as mortal:
        addresses = (steady.grpc_url, mortal.grpc_url)
        with quick_gateway(steady, repository, triton=addresses, probe_seconds=PROBE) as target:
            assert wait_for(lambda: target.metric("trtqwen_gateway_replica_up") == 2)
            before = executions(steady)
            streams = Streams(target, 8)
            os.killpg(mortal.pid, signal.SIGKILL)
            assert wait_for(lambda: target.metric("trtqwen_gateway_replica_up") == 1)
            assert target.get("/ready")[0] == 200
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda _: target.ask("hello", max_tokens=5), range(8)))
            assert [status for status, _, _ in answers] == [200] * 8
            streams.join()
            whole = target.chat("/again 400 ab", max_tokens=450).choices[0].message.content
            failed = [error is not None for error in streams.errors]
            assert failed.count(True) == 4  # the replica with the fewest tokens to do was taken each time
            assert all(text == whole for text, error in zip(streams.texts, failed, strict=True) if not error)
            mortal.stop()
            with TritonServer(repository, ports=mortal.ports) as again:
                assert wait_for(lambda: target.metric("trtqwen_gateway_replica_up") == 2)
                probed = executions(again)
                with ThreadPoolExecutor(8) as pool:
                    answers = list(pool.map(lambda _: target.ask("hello", max_tokens=5), range(16)))
                assert [status for status, _, _ in answers] == [200] * 16
                assert executions(again) > probed
                os.killpg(again.pid, signal.SIGKILL)
            assert executions(steady) > before

"""Death and stops: whoever is killed, every open client hears of it soon, and readiness turns red."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from tests.gateway.conftest import Running, quick_gateway, quick_triton
from tests.gateway.deaths import LONG, Streams, check_death, process
from tests.waiting import wait_for
from trtqwen.diagnostics import InputError, ServerError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.process import GatewayProcess
from trtqwen.triton.server import TritonServer

pytestmark = pytest.mark.triton
PROBE = 1.5  # seconds; 2 by default


@pytest.fixture(scope="module")
def triton(unhurried_repository: Path) -> Iterator[TritonServer]:
    with quick_triton(unhurried_repository) as server:
        yield server


@pytest.fixture
def start(unhurried_repository: Path, triton: TritonServer) -> Iterator[Callable[..., Running]]:
    """Starts gateways in front of it."""
    with ExitStack() as started:
        yield lambda **settings: started.enter_context(quick_gateway(triton, unhurried_repository, **settings))


def test_deaths_behind_the_gateway_are_errors_and_a_return_is_noticed(unhurried_repository: Path) -> None:
    repository = unhurried_repository
    with (
        quick_triton(repository) as triton,
        quick_gateway(triton, repository, probe_seconds=PROBE) as target,
    ):
        backend = process(triton.pid, "tensorrt_llm/1/model.py")
        check_death(target, lambda: os.kill(backend, signal.SIGKILL))
        os.killpg(triton.pid, signal.SIGKILL)
        triton.stop()
        with TritonServer(repository, ports=triton.ports) as again:
            assert wait_for(lambda: target.get("/ready")[0] == 200)
            check_death(target, lambda: os.killpg(again.pid, signal.SIGKILL))


def test_the_gateway_s_death_is_an_error_and_frees_the_engine(start: Callable[..., Running]) -> None:
    target, other = start(), start()
    streams = Streams(target, 3)
    os.kill(target.gateway.pid, signal.SIGKILL)
    killed = time.monotonic()
    streams.join()
    assert all(streams.errors)
    assert max(streams.ended) - killed < 30  # half of the client's own limit
    assert other.chat("still there", max_tokens=50).choices[0].message.content == "still there"


def test_a_stop_finishes_what_runs_and_refuses_the_rest(start: Callable[..., Running]) -> None:
    target, other = start(), start()
    streams = Streams(target, 3)
    os.kill(target.gateway.pid, signal.SIGTERM)
    assert wait_for(lambda: target.get("/ready")[0] == 503)
    with pytest.raises(openai.APIStatusError, match="stopping") as caught:
        target.chat("hi")
    assert caught.value.status_code == 503
    streams.join()
    assert streams.errors == [None] * 3
    whole = other.chat(LONG, max_tokens=450).choices[0].message.content
    assert streams.texts == [whole] * 3
    assert target.gateway.stop() == 0


def test_a_gateway_ends_with_whoever_started_it_and_does_not_wait_for_ever(start: Callable[..., Running]) -> None:
    target = start(drain_seconds=0.05)
    pid = target.gateway.pid
    streams = Streams(target, 1)
    process = target.gateway._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    command = Path(f"/proc/{pid}/cmdline")  # of a zombie, until it is waited for, it is empty
    assert wait_for(lambda: not command.exists() or not command.read_bytes())
    streams.join()
    assert "stopping" in str(streams.errors[0])
    assert target.gateway.stop() == 0


def test_what_cannot_start_says_why(stand_in_repository: Path, tmp_path: Path, obedient: Running) -> None:
    with pytest.raises(InputError, match="the gateway cannot listen there"):
        GatewayProcess(GatewayConfig(repository=stand_in_repository, port=obedient.gateway.config.port))
    gateway = GatewayProcess(GatewayConfig(repository=tmp_path, port=0))
    gateway.start()
    with pytest.raises(ServerError, match=r"with code 2: .* is not a finished repository"):
        gateway.wait_until_ready()
    gateway.stop()


def test_one_that_listens_gives_the_engine_its_own_time(stand_in_repository: Path) -> None:
    """Its first token may take as long as the engine's start; the gateway has a minute until it listens."""
    config = GatewayConfig(repository=stand_in_repository, triton=("127.0.0.1:9",), port=0, model_name="qwen")
    gateway = GatewayProcess(config, engine_seconds=1800)
    try:
        for _ in range(2):
            gateway.start()
            assert gateway.start_seconds == 60
            assert wait_for(lambda: gateway.answers() or gateway.start_seconds == 1800)
            gateway.stop()
    finally:
        gateway.stop(drain=False)


def test_a_gateway_that_is_stopped_for_long_counts_as_ended(
    stand_in_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtqwen.gateway.process._LOOK_SECONDS", 0.0)
    config = GatewayConfig(repository=stand_in_repository, port=0)
    patient, strict = GatewayProcess(config), GatewayProcess(config, frozen_seconds=0.2)
    with subprocess.Popen(["sleep", "600"], start_new_session=True, text=True) as asleep:
        patient._process = strict._process = asleep
        strict.check()
        os.kill(asleep.pid, signal.SIGSTOP)

        def ended() -> bool:
            try:
                strict.check()
            except ServerError as problem:
                return "has been stopped (SIGSTOP)" in problem.what
            return False

        assert wait_for(ended)
        patient.check()
        asleep.kill()
    patient._listener.close()
    strict._listener.close()

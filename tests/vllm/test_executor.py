"""vLLM's process and the executor in front of it: one that obeys, dies, hangs, or is another than it should be."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.standins import vllm_server
from tests.waiting import wait_for
from trtqwen.artifact.manifest import write_manifest
from trtqwen.diagnostics import EngineError, RequestError, ServerError
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import FinishReason, OutputConfig, Request, Response
from trtqwen.system.processes import child, living
from trtqwen.vllm.executor import VllmExecutor
from trtqwen.vllm.server import VllmServer


@pytest.fixture(scope="session")
def vllm_engine(bundled_engine: Callable[..., Path]) -> Path:
    return bundled_engine(backend="vllm")


@pytest.fixture
def start(
    vllm_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., VllmExecutor]]:
    """Starts executors on the stand-in, with settings of `engine.vllm` and a script."""
    monkeypatch.setenv("TRTQWEN_VLLM_PYTHON", str(vllm_server.write_python(tmp_path / "python")))
    with ExitStack() as started:
        servers: list[VllmServer] = []

        def make(
            script: dict[str, Any] | None = None,
            settings: dict[str, Any] | None = None,
            config: ExecutorConfig | None = None,
            stall_seconds: float = 300,
        ) -> VllmExecutor:
            monkeypatch.setenv("STAND_IN_VLLM", json.dumps(script or {}))
            engine = vllm_engine
            if settings:
                engine = Path(shutil.copytree(vllm_engine, tmp_path / "engine", dirs_exist_ok=True))
                content = json.loads((engine / "config.json").read_text())
                content["vllm"] |= settings
                (engine / "config.json").write_text(json.dumps(content, indent=4))
                (engine / "manifest.json").unlink()
                write_manifest(engine, "engine", {}, {})
            place = None
            if read_engine_config(engine).starts_vllm:
                servers.append(started.enter_context(VllmServer(engine, config or ExecutorConfig())))
                place = servers[-1].place
            return started.enter_context(VllmExecutor(engine, config, place=place, stall_seconds=stall_seconds))

        make.servers = servers  # type: ignore[attr-defined]
        yield make


def request(**fields: Any) -> Request:
    return Request(**{"id": "1", "input_token_ids": (1, 2, 3), "max_tokens": 6, **fields})


def joined(responses: list[Response]) -> tuple[list[int], FinishReason | None]:
    return [token for response in responses for token in response.token_ids], responses[-1].finish_reason


def test_tokens_come_with_their_log_probs(start: Callable[..., VllmExecutor]) -> None:
    executor = start()
    [responses] = executor.generate([request(output=OutputConfig(return_log_probs=True))])
    assert joined(responses) == ([5, 6, 7, 8, 5, 6], FinishReason.LENGTH)
    assert [value for response in responses for value in response.log_probs] == [0, -1, -2, -3, -4, -5]
    [ranked] = executor.generate([request(id="3", output=OutputConfig(return_log_probs=True, num_top_log_probs=2))])
    parts = [response.top_log_probs for response in ranked if response.top_log_probs is not None]
    ids = np.frombuffer(b"".join(part.ids for part in parts), np.int32).reshape(6, 2)
    values = np.frombuffer(b"".join(part.log_probs for part in parts), np.float32).reshape(6, 2)
    assert ids.tolist() == [[5, 100], *[[100, 101]] * 5]  # the chosen token only where it is among the likeliest
    assert values.tolist() == [[0, 0], *[[0, -0.5]] * 5]
    [told] = executor.generate([request(id="2", output=OutputConfig(return_perf_metrics=True))])
    assert joined(told) == ([5, 6, 7, 8, 5, 6], FinishReason.LENGTH)
    metrics = told[-1].perf_metrics
    assert metrics is not None
    assert (metrics.kv_cache_reused_blocks, metrics.kv_cache_alloc_total_blocks) == (1, 1)
    assert metrics.arrival_time_ns <= metrics.first_token_time_ns <= metrics.last_token_time_ns
    stats = executor.stats()
    assert (stats.max_blocks, stats.used_blocks, stats.reused_blocks) == (100, 50, 3)
    assert executor.resident_bytes > 1e6


def test_a_request_goes_on_no_connection_that_vllm_closes(start: Callable[..., VllmExecutor]) -> None:
    """vLLM closes connections that idle; the event loop has not seen it when the next request begins."""
    executor = start({"keep_alive": 0.05})
    executor.stats()  # over a connection that could serve again
    responses: queue.Queue[Response] = queue.Queue()
    submitted = threading.Event()
    executor._loop.call_soon_threadsafe(submitted.wait, 60)
    executor.submit(request(id="2"), responses.put)
    executor._loop.call_soon_threadsafe(time.sleep, 0.5)  # the request has begun, and comes next
    submitted.set()
    parts = [responses.get(timeout=60)]
    while parts[-1].finish_reason is None:
        parts.append(responses.get(timeout=60))
    assert joined(parts) == ([5, 6, 7, 8, 5, 6], FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("fields", "answer", "reason"),
    [
        ({"end_id": 7}, [5, 6], FinishReason.END_ID),
        ({"stop_words": ((7,),)}, [5, 6, 7], FinishReason.STOP_WORDS),
        ({"stop_words": ((6, 7),)}, [5, 6, 7], FinishReason.STOP_WORDS),
        ({"stop_words": ((7, 6),)}, [5, 6, 7, 8, 5, 6], FinishReason.LENGTH),
        ({"stop_words": ((5, 6),), "sampling": {"min_tokens": 3}}, [5, 6, 7, 8, 5, 6], FinishReason.STOP_WORDS),
    ],
)
def test_answers_end_by_the_executors_rules(
    start: Callable[..., VllmExecutor], fields: dict[str, Any], answer: list[int], reason: FinishReason
) -> None:
    [responses] = start().generate([request(**fields)])
    assert joined(responses) == (answer, reason)


def test_a_refusal_is_the_requests_own_error(start: Callable[..., VllmExecutor]) -> None:
    executor = start()
    bad, good = executor.generate([request(input_token_ids=(13,)), request(id="2")])
    assert bad[-1].finish_reason is FinishReason.ERROR
    assert bad[-1].error == "vLLM refuses the request: unlucky prompt"
    assert good[-1].finish_reason is FinishReason.LENGTH
    with pytest.raises(RequestError, match="exceeds maximum input length"):
        executor.submit(request(id="3", input_token_ids=(1,) * 512), lambda response: None)


def test_a_cancelled_request_frees_vllm(start: Callable[..., VllmExecutor]) -> None:
    executor, seen, begun = start({"gap": 0.01}), [], threading.Event()

    def take(response: Response) -> None:
        seen.append(response)
        begun.set()

    executor.submit(request(max_tokens=400), take)
    assert begun.wait(60)
    executor.cancel("1")
    assert wait_for(lambda: seen[-1].finish_reason is FinishReason.CANCELLED)
    assert wait_for(lambda: executor.stats().active == 0)


def test_the_queue_is_bounded(start: Callable[..., VllmExecutor]) -> None:
    executor = start({"gap": 1}, config=ExecutorConfig(max_queue_size=1))
    for index in range(17):  # 16 run, one waits
        executor.submit(request(id=str(index), max_tokens=400), lambda response: None)
    with pytest.raises(EngineError, match="Maximum queue size of 1 has been reached"):
        executor.submit(request(id="one more"), lambda response: None)


@pytest.mark.parametrize("script", [{"die_after": 2}, {"silent_after": 2}])
def test_a_vllm_that_dies_or_hangs_is_an_error_for_everybody(
    start: Callable[..., VllmExecutor], script: dict[str, Any]
) -> None:
    executor = start(script, stall_seconds=1)
    [responses] = executor.generate([request()])
    cause = "vLLM does not answer" if "die_after" in script else "it sent no token for 1 s"
    assert responses[-1].finish_reason is FinishReason.ERROR
    assert cause in str(responses[-1].error)
    with pytest.raises(EngineError, match=cause):
        executor.submit(request(id="2"), lambda response: None)
    with pytest.raises(EngineError, match=cause):
        executor.stats()
    assert not executor.alive


def test_a_killed_vllm_is_noticed_without_requests(start: Any) -> None:
    executor = start()
    [server] = start.servers
    os.kill(child(server.pid), signal.SIGKILL)

    with pytest.raises(ServerError, match="vLLM was ended by SIGKILL"):
        while True:
            server.check()
    with pytest.raises(EngineError, match="vLLM does not answer"):
        while True:
            executor.stats()
    assert not executor.alive


def test_statistics_wait_for_a_token(start: Any) -> None:
    """A watchdog reads from them that the engine works: they say nothing while it sends nothing."""
    executor, begun = start({"silent_after": 1}), threading.Event()
    executor.submit(request(), lambda response: begun.set())
    assert begun.wait(60)
    executor.stats()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(executor.stats)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        executor.cancel("1")
        assert waiting.result(60).max_blocks == 100


def test_nothing_of_vllm_is_left(start: Any) -> None:
    start()
    [server] = start.servers
    place = server.place
    server.stop()
    assert not list(living(place.pid))
    assert not place.socket.parent.exists()
    server.stop()


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ({"exit": 1}, {}, "vLLM ended with code 1: ValueError: the model does not fit"),
        ({"unknown": "block-size"}, {}, "vLLM ended with code 2: error: unrecognized arguments: --block-size"),
        ({"told": None}, {}, "does not answer as vLLM does"),
        ({"name": "llama"}, {}, "serves llama, not trtqwen"),
        ({"tokens": [1, 2]}, {}, "serves a model with another tokenizer"),
        ({}, {"python": "no-such-python"}, "no-such-python: no such interpreter"),
        ({}, {"python": sys.executable}, "has no vLLM"),
        ({}, {"address": "http://127.0.0.1:9"}, "http://127.0.0.1:9: no vLLM answers"),
    ],
)
def test_what_cannot_start_is_one_sentence(
    start: Callable[..., VllmExecutor],
    monkeypatch: pytest.MonkeyPatch,
    script: dict[str, Any],
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("trtqwen.vllm.executor._ASK_SECONDS", 1.0)
    with pytest.raises((EngineError, ServerError)) as caught:
        start(script, settings)
    assert message in caught.value.what
    assert caught.value.hint


def test_an_older_vllm_without_an_option(start: Callable[..., VllmExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", "0.24.0")
    with pytest.raises(EngineError, match=r"vLLM 0\.24\.0 has no option --log-level"):
        start({}, {"arguments": {"log-level": "info"}})
    monkeypatch.setenv("STAND_IN_VERSION", "0.11.0")
    with pytest.raises(EngineError, match=r"vLLM 0\.11\.0 is older than 0\.24\.0, the oldest that is served"):
        start()


def test_a_vllm_at_an_address(start: Callable[..., VllmExecutor], vllm_engine: Path) -> None:
    command = [sys.executable, vllm_server.__file__, "--served-model-name=qwen", "--max-model-len=512"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            [responses] = start({}, {"address": address, "served_name": "qwen"}).generate([request()])
            assert joined(responses)[0] == [5, 6, 7, 8, 5, 6]
        finally:
            process.kill()

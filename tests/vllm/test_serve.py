"""`serve` starts vLLM next to Triton, watches both, and stops both: on a stand-in for vLLM and a real Triton."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slow import slow
from tests.standins import host, vllm_server
from tests.triton.conftest import Call, id_request
from trtqwen.artifact.manifest import write_manifest
from trtqwen.diagnostics import EngineError, ServerError
from trtqwen.recipe import ServeRecipe
from trtqwen.system.processes import child, living
from trtqwen.triton.ports import Ports
from trtqwen.triton.replicas import TritonReplicas
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

pytestmark = pytest.mark.triton
PATIENCE = 60.0


@pytest.fixture(scope="module")
def vllm_repository(bundled_engine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("vllm") / "repository"
    write_repository(bundled_engine(backend="vllm"), ServeRecipe(), output)
    return output


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTQWEN_VLLM_PYTHON", str(vllm_server.write_python(tmp_path / "python")))


def problem_of(server: TritonServer) -> str:
    """What is wrong with a server in which something has just been broken."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            server.check()
        except ServerError as problem:
            return str(problem)
        time.sleep(0.05)
    raise AssertionError("nothing is wrong")


@pytest.mark.slow
def test_a_killed_vllm_is_named_and_a_restart_serves_again(vllm_repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with TritonServer(vllm_repository, ports=Ports(0, 0, 0), log=log) as server:
        [reply] = list(Call(server, "tensorrt_llm", id_request([1, 2, 3], 6)))
        assert reply.ids == [5, 6, 7, 8, 5, 6]
        vllm = server.vllm_pid
        assert vllm is not None
        os.kill(child(vllm), signal.SIGKILL)
        problem = problem_of(server)
        assert "vLLM was ended by SIGKILL" in problem
        assert str(tmp_path / "log-vllm.txt") in problem
        server.stop(drain=False)
        assert not list(living(vllm))
        server.start()
        server.wait_until_ready()
        server.check()
        [reply] = list(Call(server, "tensorrt_llm", id_request([1, 2, 3], 2)))
        assert reply.ids == [5, 6]
        vllm = server.vllm_pid
        assert vllm is not None
    assert not list(living(vllm))


@pytest.mark.slow
@pytest.mark.parametrize("stops", ["process", "tokens"])
def test_a_vllm_that_hangs_is_named(vllm_repository: Path, monkeypatch: pytest.MonkeyPatch, stops: str) -> None:
    script: dict[str, Any] = {"silent_after": 1} if stops == "tokens" else {}
    monkeypatch.setenv("STAND_IN_VLLM", json.dumps(script))
    with TritonServer(vllm_repository, ports=Ports(None, 0, 0), watchdog_seconds=1) as server:
        call = Call(server, "tensorrt_llm", id_request([1, 2, 3], 6)) if stops == "tokens" else None
        vllm = server.vllm_pid
        assert vllm is not None
        if call is None:
            os.kill(child(vllm), signal.SIGSTOP)
        expected = "no step of the engine has ended" if call else f"process {child(vllm)} is stopped (SIGSTOP)"
        assert expected in problem_of(server)
        server.stop(drain=False)
    assert not list(living(vllm))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"exit": 1}, "vLLM ended with code 1: ValueError: the model does not fit"),
        slow({"name": "llama"}, "the model tensorrt_llm does not load: vLLM: serves llama, not trtqwen"),
    ],
)
def test_a_vllm_that_does_not_serve_ends_the_start(
    vllm_repository: Path, monkeypatch: pytest.MonkeyPatch, script: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("STAND_IN_VLLM", json.dumps(script))
    server = TritonServer(vllm_repository, ports=Ports(None, 0, 0))
    with pytest.raises(ServerError) as caught, server:
        pass
    assert caught.value.what == message
    assert caught.value.hint


def test_an_option_that_vllm_lacks_ends_it_before_the_start(
    vllm_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtqwen.vllm.server.server_options", lambda *words, **names: {"no-such-option": True})
    with pytest.raises(EngineError, match=r"vLLM 0\.32\.0 has no option --no-such-option"):
        TritonServer(vllm_repository, ports=Ports(None, 0, 0))


def test_a_dry_run_shows_both_commands(vllm_repository: Path) -> None:
    launch = TritonServer(vllm_repository, ports=Ports(None, 0, 0)).launch()
    vllm, _, triton = launch.shell().partition(" &\n")
    assert "--max-num-seqs=16" in vllm
    socket = launch.environment["TRTQWEN_VLLM_SOCKET"]
    assert f"--uds={socket}" in vllm
    assert socket in triton


@pytest.mark.parametrize("image", [None, "nvcr.io/nvidia/tritonserver:26.07-vllm-python-py3"])
def test_replicas_of_two_ranks_get_cards_of_their_own(
    bundled_engine: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str | None
) -> None:
    """Four GeForce cards, which cannot read each other's memory."""
    host.install(tmp_path / "host", monkeypatch)
    engine = Path(shutil.copytree(bundled_engine(2, backend="vllm"), tmp_path / "engine"))
    content = json.loads((engine / "config.json").read_text())
    content["vllm"] |= {"image": image, "arguments": {"scheduling-policy": "priority"}}
    (engine / "config.json").write_text(json.dumps(content))
    (engine / "manifest.json").unlink()
    write_manifest(engine, "engine", {}, {})
    serve = ServeRecipe(replicas=2, kv_cache_free_gpu_mem_fraction=0.5, enable_kv_cache_reuse=True)
    write_repository(engine, serve, tmp_path / "repository")
    launches = TritonReplicas(tmp_path / "repository", ports=Ports(None, 0, 0)).launches()
    assert [launch.environment["CUDA_VISIBLE_DEVICES"] for launch in launches] == ["0,1", "2,3"]
    for launch, cards in zip(launches, ("0,1", "2,3"), strict=True):
        words = launch.vllm
        for word in (
            *("--tensor-parallel-size=2", "--disable-custom-all-reduce", "--scheduling-policy=priority"),
            *("--enable-prefix-caching", "--max-model-len=512", "--served-model-name=trtqwen"),
        ):
            assert word in words
        [share] = [word for word in words if word.startswith("--gpu-memory-utilization=")]
        assert 0.5 <= float(share.partition("=")[2]) < 0.51
        assert launch.vllm_environment["NCCL_P2P_DISABLE"] == "1"
        if image is None:
            assert launch.vllm_environment["CUDA_VISIBLE_DEVICES"] == cards
            assert words[1:3] == ("-m", "vllm.entrypoints.openai.api_server")
        else:
            assert words[:4] == ("docker", "run", "--rm", "--init")
            assert f'--gpus="device={cards}"' in words
            assert "--env=NCCL_P2P_DISABLE=1" in words
            assert words[words.index(image) :][:3] == (image, "-m", "vllm.entrypoints.openai.api_server")

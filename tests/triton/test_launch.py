"""The command for one rank, several ranks and several replicas; stand-ins run it where the C++ backend cannot."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.standins import host, mpirun, tritonserver
from trtqwen.diagnostics import InputError, ServerError
from trtqwen.system.host import Gpu, Host
from trtqwen.system.processes import living
from trtqwen.triton.installation import find_tritonserver
from trtqwen.triton.launch import Deployment, Endpoint, Launch, plan_launch, read_deployment
from trtqwen.triton.server import Ports, TritonServer

ENDPOINT = Endpoint("127.0.0.1", 8000, 8001, 8002)
FOUR_4090D = Host(gpus=tuple(Gpu(index, "NVIDIA GeForce RTX 4090 D", "8.9", 24564, 1) for index in range(4)))


def plan(world_size: int = 1, replicas: int = 1, host: Host | None = None) -> Launch:
    deployment = Deployment(world_size, replicas)
    binary, prefix = Path("/opt/tritonserver/bin/tritonserver"), "x-"
    return plan_launch(Path("/repo"), deployment, binary, ENDPOINT, shm_prefix=prefix, drain_seconds=30, host=host)


def test_one_rank_is_tritonserver_itself() -> None:
    launch = plan()
    assert launch.command[0] == "/opt/tritonserver/bin/tritonserver"
    assert (launch.tritonservers, launch.environment) == (1, {})
    assert "--http-port=8000" in launch.command


def test_in_leader_mode_rank_0_serves_and_the_others_load_the_engine_alone() -> None:
    launch = plan(world_size=4)
    assert launch.command[:2] == ("mpirun", "--allow-run-as-root")
    text = " ".join(launch.command[2:])
    leader, *workers = text.split(" : ")
    assert len(workers) == 3
    assert launch.tritonservers == 4
    assert "--model-control-mode=none" in leader
    for worker in workers:
        assert "--load-model=tensorrt_llm" in worker
        assert "-port=" not in worker
    prefixes = [word for word in launch.command if "shm-region-prefix-name" in word]
    assert len(set(prefixes)) == 4


def test_replicas_are_spawned_behind_one_address() -> None:
    launch = plan(world_size=2, replicas=2)
    assert launch.tritonservers == 1
    assert ":" not in launch.command
    assert dict(launch.environment)["TRTLLM_ORCHESTRATOR"] == "1"
    assert [word for word in launch.command if "cuda-memory-pool" in word] == [
        f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(4)
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["NVIDIA GeForce RTX 4090 D"] * 2, {"NCCL_P2P_DISABLE": "1"}), (["NVIDIA H100 80GB HBM3"] * 2, {})],
)
def test_cards_without_peer_access_do_not_try_it(
    monkeypatch: pytest.MonkeyPatch, names: list[str], expected: dict[str, str]
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    host = Host(gpus=tuple(Gpu(index, name, "8.9", 24564, 1) for index, name in enumerate(names)))
    assert plan(world_size=2, host=host).environment == expected
    assert plan(world_size=1, host=host).environment == {}
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")  # the user knows better
    assert plan(world_size=2, host=host).environment == {}


def test_the_line_for_people_is_the_command() -> None:
    launch = plan(world_size=2, host=FOUR_4090D)
    words = shlex.split(launch.shell())
    assert words[0] == "NCCL_P2P_DISABLE=1"
    assert tuple(words[1:]) == launch.command


@pytest.mark.triton
def test_every_flag_is_one_of_the_real_tritonservers() -> None:
    installation = find_tritonserver()
    libraries = os.pathsep.join(map(str, installation.libraries))
    shown = subprocess.run(
        [installation.binary, "--help"], capture_output=True, text=True, env={"LD_LIBRARY_PATH": libraries}
    )
    known = shown.stdout + shown.stderr
    used = {word.partition("=")[0] for launch in (plan(), plan(4), plan(2, 2)) for word in launch.command}
    flags = {word for word in used if word.startswith("--") and word != "--allow-run-as-root"}
    assert flags <= {f"--{name}" for name in tritonserver.FLAGS}
    assert [name for name in tritonserver.FLAGS if f"--{name}" not in known] == []


def test_a_repository_tells_ranks_and_replicas(trt_repository: Callable[..., Path], repository: Path) -> None:
    assert read_deployment(repository) == Deployment()
    found = read_deployment(trt_repository(2, 2))
    assert (found.world_size, found.replicas, found.mode) == (2, 2, "orchestrator")
    assert found.engine is not None
    (found.engine / "rank1.engine").unlink()
    with pytest.raises(InputError, match=r"rank1\.engine is missing"):
        read_deployment(found.engine.parent / "repository")
    assert replace(found, replicas=1).mode == "leader"


@pytest.fixture
def standins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with four GPUs, TensorRT-LLM, mpirun and tritonserver.

    Returns:
        The file in which the processes of tritonserver record themselves.
    """
    host.install(tmp_path, monkeypatch)
    programs = tmp_path / "bin"
    for module in (mpirun, tritonserver):
        assert module.__file__ is not None
        program = programs / Path(module.__file__).stem
        program.write_text(f"#!{sys.executable}\n" + Path(module.__file__).read_text())
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN_RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    return tmp_path / "record"


def records(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda record: record["environment"]["OMPI_COMM_WORLD_RANK"])


def test_four_ranks_start_serve_and_stop(trt_repository: Callable[..., Path], standins: Path) -> None:
    with TritonServer(trt_repository(4), ports=Ports(0, 0, 0), drain_seconds=2) as server:
        session = server.pid
        server.check()
        deadline = time.monotonic() + 10
        while len(ranks := records(standins)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [record["environment"] for record in ranks] == [
            {"OMPI_COMM_WORLD_RANK": str(rank), "NCCL_P2P_DISABLE": "1"} for rank in range(4)
        ]
        assert set(living(session)) >= {record["pid"] for record in ranks}
    assert not list(living(session))


@pytest.mark.parametrize("blind", [False, True], ids=["mpirun-ends", "mpirun-hangs"])
def test_a_dead_rank_ends_the_group(
    trt_repository: Callable[..., Path], standins: Path, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    if blind:
        monkeypatch.setenv("STANDIN_MPI_BLIND", "1")
    server = TritonServer(trt_repository(2), ports=Ports(0, 0, 0), drain_seconds=1)
    with server:
        session = server.pid
        deadline = time.monotonic() + 10
        while len(standins.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.check()
        os.kill(records(standins)[1]["pid"], signal.SIGKILL)
        with pytest.raises(ServerError, match="the last words of a rank"):
            while time.monotonic() < deadline:
                server.check()
                time.sleep(0.05)
    assert not list(living(session))


def test_without_mpirun_one_sentence_says_so(
    trt_repository: Callable[..., Path], standins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (standins.parent / "bin" / "mpirun").unlink()  # the real one is not on a machine without GPUs
    monkeypatch.setenv("PATH", str(standins.parent / "bin"))
    with (
        pytest.raises(ServerError, match="mpirun is not on this machine"),
        TritonServer(trt_repository(2), ports=Ports(0, 0, 0)),
    ):
        pass


def test_an_engine_of_another_release_is_not_started(
    trt_repository: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.install(tmp_path, monkeypatch, tensorrt_llm="1.0.0", tensorrt="10.11.0.33")
    with pytest.raises(ServerError, match=r"was built by TensorRT-LLM 1\.2\.1, here is TensorRT-LLM 1\.0\.0"):
        TritonServer(trt_repository(1), ports=Ports(0, 0, 0))

"""The command for one rank, several ranks and several replicas; stand-ins run it where the C++ backend cannot."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.slow import slow
from tests.standins import host, mpirun, tritonserver
from trtqwen.diagnostics import InputError, ServerError
from trtqwen.recipe import ServeRecipe, load_recipe, recipe_names
from trtqwen.system.host import Gpu, Host
from trtqwen.system.processes import living
from trtqwen.triton.installation import find_tritonserver
from trtqwen.triton.integrity import check_served_files
from trtqwen.triton.launch import (
    MPIRUN,
    Deployment,
    Endpoint,
    Launch,
    plan_launch,
    rank_hosts,
    read_deployment,
    server_devices,
)
from trtqwen.triton.ports import Ports
from trtqwen.triton.replicas import TritonReplicas
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer
from trtqwen.triton.supervisor import Supervisor

ENDPOINT = Endpoint("127.0.0.1", 8000, 8001, 8002)
REAL_MPIRUN = pytest.mark.skipif(
    shutil.which("mpirun", path=str(Path(sys.executable).parent)) is None, reason="needs the package openmpi"
)
FOUR_4090D = Host(gpus=tuple(Gpu(index, "NVIDIA GeForce RTX 4090 D", "8.9", 24564, 1) for index in range(4)))


def plan(world_size: int = 1, replicas: int = 1, host: Host | None = None, devices: tuple[str, ...] = ()) -> Launch:
    deployment = Deployment(world_size, replicas)
    binary, prefix = Path("/opt/tritonserver/bin/tritonserver"), "x-"
    return plan_launch(
        Path("/repo"),
        deployment,
        binary,
        ENDPOINT,
        shm_prefix=prefix,
        drain_seconds=30,
        host=host,
        devices=devices,
    )


def test_one_rank_is_tritonserver_itself() -> None:
    launch = plan()
    assert launch.command[0] == "/opt/tritonserver/bin/tritonserver"
    assert (launch.tritonservers, launch.environment) == (1, {})
    assert "--http-port=8000" in launch.command


def test_in_leader_mode_rank_0_serves_and_the_others_load_the_engine_alone() -> None:
    launch = plan(world_size=4)
    assert launch.command[:5] == ("mpirun", "--allow-run-as-root", "--bind-to", "none", "--oversubscribe")
    text = " ".join(launch.command[5:])
    leader, *workers = text.split(" : ")
    assert len(workers) == 3
    assert launch.tritonservers == 4
    assert "--model-control-mode=none" in leader
    for worker in workers:
        assert "--load-model=tensorrt_llm" in worker
        assert "-port=" not in worker
    prefixes = [word for word in launch.command if "shm-region-prefix-name" in word]
    assert len(set(prefixes)) == 4


def test_a_server_of_its_own_sees_the_gpus_of_its_replica() -> None:
    launch = plan(world_size=2, host=FOUR_4090D, devices=("2", "3"))
    assert launch.environment == {
        "NCCL_P2P_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "2,3",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


@pytest.mark.parametrize(
    ("deployment", "setting", "expected"),
    [
        (Deployment(1, 1, Path("e"), 4), None, [("0",), ("1",), ("2",), ("3",)]),
        (Deployment(2, 1, Path("e"), 2), None, [("0", "1"), ("2", "3")]),
        (Deployment(1, 1, Path("e"), 2), "3, 1", [("3",), ("1",)]),
        (Deployment(2, 1, Path("e"), 1), "2,3", [()]),
        (Deployment(1, 1, Path("e"), 2), "GPU-aa,GPU-bb", [("GPU-aa",), ("GPU-bb",)]),
        (Deployment(), None, [()]),
        (Deployment(servers=2, own_ranks=2), None, [("0", "1"), ("2", "3")]),
        (Deployment(servers=5, own_ranks=0), None, [()] * 5),
    ],
)
def test_each_server_gets_the_next_gpus(
    monkeypatch: pytest.MonkeyPatch, deployment: Deployment, setting: str | None, expected: list[tuple[str, ...]]
) -> None:
    if setting is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert server_devices(deployment, FOUR_4090D) == expected


@pytest.mark.parametrize(
    "deployment",
    [
        Deployment(1, 1, Path("e"), 5),
        Deployment(8, 1, Path("e")),
        Deployment(2, 3, Path("e")),
        Deployment(servers=3, own_ranks=2),
    ],
)
def test_too_few_gpus_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, deployment: Deployment
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=r"needs \d GPUs .*, and 4 are visible"):
        server_devices(deployment, FOUR_4090D)


@pytest.mark.parametrize(("device", "gpus"), [("auto", 2), ("cuda", 2), ("cpu", 0)])
def test_replicas_of_the_embedded_engine_take_gpus_for_their_ranks(
    bundled_engine: Callable[..., Path], tmp_path: Path, device: Literal["auto", "cuda", "cpu"], gpus: int
) -> None:
    write_repository(bundled_engine(2), ServeRecipe(replicas=2, device=device), tmp_path / "repository")
    deployment = read_deployment(tmp_path / "repository")
    assert (deployment.servers, deployment.gpus) == (2, gpus)


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
    flags = {word for word in used if word.startswith("--")} - set(MPIRUN)
    assert flags <= {f"--{name}" for name in tritonserver.FLAGS}
    assert [name for name in tritonserver.FLAGS if f"--{name}" not in known] == []


def test_a_repository_tells_ranks_and_replicas(trt_repository: Callable[..., Path], repository: Path) -> None:
    assert read_deployment(repository) == Deployment()
    found = read_deployment(trt_repository(2, 2, "orchestrator"))
    assert (found.world_size, found.replicas, found.servers, found.mode) == (2, 2, 1, "orchestrator")
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
    # A server looks next to its Python first, where the package openmpi puts the real one.
    monkeypatch.setattr("trtqwen.triton.launch.MPIRUN", (str(programs / "mpirun"), *MPIRUN[1:]))
    monkeypatch.setenv("STANDIN_RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    return tmp_path / "record"


def records(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda record: record["environment"]["OMPI_COMM_WORLD_RANK"])


def test_what_killed_builds_left_is_removed_before_it_is_served(
    trt_repository: Callable[..., Path], tmp_path: Path
) -> None:
    repository = trt_repository(1)
    left = [tmp_path / f".{name}.tmp" for name in ("repository", "engine", "checkpoint")]
    for directory in left:
        directory.mkdir()
        (directory / "weights").write_bytes(b"half")
    check_served_files(repository)
    assert not any(directory.exists() for directory in left)


def test_a_tensorrt_engine_that_counts_no_iterations_hangs(
    trt_repository: Callable[..., Path], standins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = tmp_path / "metrics"
    monkeypatch.setenv("STANDIN_METRICS", str(metrics))

    def says(iterations: int, active: int) -> None:
        part = tmp_path / "part"
        part.write_text(
            f'nv_trt_llm_general_metrics{{general_type="iteration_counter",model="tensorrt_llm"}} {iterations}\n'
            f'nv_trt_llm_request_metrics{{model="tensorrt_llm",request_type="active"}} {active}\n'
        )
        part.replace(metrics)

    says(5, 0)
    with TritonServer(trt_repository(1), ports=Ports(0, 0, 0), watchdog_seconds=1.5) as server:
        until = time.monotonic() + 3
        while time.monotonic() < until:  # idle
            server.check()
            time.sleep(0.05)
        says(6, 2)
        begun = time.monotonic()
        with pytest.raises(ServerError, match=r"the engine hangs: no step of the engine has ended for"):
            while time.monotonic() - begun < 60:
                server.check()
                time.sleep(0.05)


@pytest.mark.parametrize("crashes", [2, 9])
def test_triton_that_crashes_over_its_own_fault_is_started_again(
    trt_repository: Callable[..., Path],
    standins: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    crashes: int,
) -> None:
    monkeypatch.setenv("STANDIN_CRASHES", str(crashes))
    server = TritonServer(trt_repository(1), ports=Ports(0, 0, 0))
    if crashes == 2:
        with server:
            server.check()
    else:
        with pytest.raises(ServerError, match="SIGABRT"), server:
            pass
    assert len(standins.read_text().splitlines()) == min(crashes, 3) + 1
    assert caplog.text.count("starting it again") == min(crashes, 3)


def test_a_model_that_does_not_unload_does_not_hold_up_a_stop(
    trt_repository: Callable[..., Path], standins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton waits for it as long as for requests, though none is left."""
    monkeypatch.setenv("STANDIN_STUCK", "1")
    monkeypatch.setattr("trtqwen.triton.server._UNLOAD_SECONDS", 0.2)
    log = tmp_path / "triton.log"
    with TritonServer(trt_repository(1), ports=Ports(0, 0, 0), drain_seconds=600, log=log) as server:
        session, begun = server.pid, time.monotonic()
    assert time.monotonic() - begun < 300
    assert "Found 1 live models" in log.read_text()
    assert not list(living(session))


def test_four_ranks_start_serve_and_stop(trt_repository: Callable[..., Path], standins: Path) -> None:
    with TritonServer(trt_repository(4), ports=Ports(0, 0, 0), drain_seconds=2) as server:
        session = server.pid
        server.check()
        deadline = time.monotonic() + 60
        while len(ranks := records(standins)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [record["environment"] for record in ranks] == [
            {"OMPI_COMM_WORLD_RANK": str(rank), "NCCL_P2P_DISABLE": "1"} for rank in range(4)
        ]
        assert set(living(session)) >= {record["pid"] for record in ranks}
    assert not list(living(session))


@pytest.fixture
def shell(tmp_path: Path) -> tuple[Path, Path]:
    """A shell for ranks that starts them here, and the file in which it notes the hosts."""
    program, noted = tmp_path / "shell", tmp_path / "hosts"
    program.write_text(f'#!/bin/sh\necho "$1" >> {noted}\nshift\nexec sh -c "$*"\n')
    program.chmod(0o755)
    return program, noted


def test_ranks_are_spread_over_hosts(
    trt_repository: Callable[..., Path], standins: Path, shell: tuple[Path, Path]
) -> None:
    program, noted = shell
    spread = rank_hosts([f"{socket.gethostname()}:2", "127.0.0.2:2"], str(program))
    with TritonServer(trt_repository(4), ports=Ports(0, 0, 0), drain_seconds=2, spread=spread) as server:
        deadline = time.monotonic() + 60
        while len(records(standins)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(records(standins)) == 4
        server.check()
        assert set(noted.read_text().splitlines()) == {"127.0.0.2"}
        session = server.pid
    assert not list(living(session))


@pytest.mark.parametrize(
    ("ranks", "replicas", "hosts", "says"),
    [
        (4, 1, ["a:2", "b:1"], "named for 3 ranks and the engine has 4"),
        (1, 1, ["a:1"], "one TensorRT engine of several ranks"),
        (2, 2, ["a:1", "b:1"], "2 replicas of 2 ranks"),
    ],
)
def test_hosts_that_do_not_fit_the_engine_are_refused(
    trt_repository: Callable[..., Path], standins: Path, ranks: int, replicas: int, hosts: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        TritonServer(trt_repository(ranks, replicas), ports=Ports(0, 0, 0), spread=rank_hosts(hosts))


@pytest.mark.parametrize("texts", [["a"], ["a:0"], ["a:x"], [":2"], ["a b:2"], ["-a:2"], ["a:1", "a:2"]])
def test_hosts_are_written_as_host_and_ranks(texts: list[str]) -> None:
    with pytest.raises(InputError):
        rank_hosts(texts)


@REAL_MPIRUN
def test_the_real_mpirun_spreads_ranks_by_the_options(shell: tuple[Path, Path], tmp_path: Path) -> None:
    program, noted = shell
    program.write_text(f'#!/bin/sh\necho "$1" >> {noted}\nshift\nexec sh -c "$*"\n')  # it gets a line, as ssh does
    spread = rank_hosts([f"{socket.gethostname()}:1", "127.0.0.2:2"], str(program))
    launch = plan_launch(
        Path("/repo"),
        Deployment(3, engine=Path("engine")),
        Path("tritonserver"),
        ENDPOINT,
        shm_prefix="x-",
        drain_seconds=1,
        spread=spread,
    )
    options = launch.command[: launch.command.index("-n")]
    assert launch.tritonservers == 1
    code = f"import os; os.mkdir(os.path.join({str(tmp_path)!r}, os.environ['OMPI_COMM_WORLD_RANK']))"
    command = [*options, "-n", "1", sys.executable, "-c", code]
    for _ in range(2):
        command += [":", "-n", "1", sys.executable, "-c", code]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert {entry.name for entry in tmp_path.iterdir()} >= {"0", "1", "2"}
    assert noted.read_text().splitlines() == ["127.0.0.2"]


def test_two_replicas_run_side_by_side(trt_repository: Callable[..., Path], standins: Path) -> None:
    found = read_deployment(trt_repository(2, 2))
    assert (found.world_size, found.replicas, found.servers, found.mode) == (2, 1, 2, "leader")
    assert found.engine is not None
    replicas = TritonReplicas(found.engine.with_name("repository"), ports=Ports(0, 0, 0), drain_seconds=2)
    assert len({*replicas.grpc_urls, *(server.http_url for server in replicas.servers)}) == 4
    with ExitStack() as running:
        for server in replicas.servers:
            running.enter_context(server)
        sessions = [server.pid for server in replicas.servers]
        deadline = time.monotonic() + 60
        while len(ranks := records(standins)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        seen = sorted((rank["gpus"], rank["environment"]["OMPI_COMM_WORLD_RANK"]) for rank in ranks)
        assert seen == [("0,1", "0"), ("0,1", "1"), ("2,3", "0"), ("2,3", "1")]
        os.kill(next(rank["pid"] for rank in ranks if rank["gpus"] == "2,3"), signal.SIGKILL)
        with pytest.raises(ServerError):
            while time.monotonic() < deadline:
                for server in replicas.servers:
                    server.check()
                time.sleep(0.05)
    assert not [pid for session in sessions for pid in living(session)]


def test_a_replica_that_does_not_start_is_told_at_once(
    trt_repository: Callable[..., Path], standins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_BROKEN_GPU", "1")
    trt_repository(1, 2)
    replicas = TritonReplicas(standins.with_name("repository"), ports=Ports(0, 0, 0), drain_seconds=2)
    with pytest.raises(ServerError, match="ended with code 1"):
        Supervisor(replicas.servers).run()


@REAL_MPIRUN
def test_the_real_mpirun_leaves_all_cores_and_starts_more_ranks_than_cores(tmp_path: Path) -> None:
    program = "import os; os.mkdir(f'{os.getpid()}-{len(os.sched_getaffinity(0))}')"  # mpirun mixes what ranks print
    command = [*MPIRUN, "-n", "1", sys.executable, "-c", program]
    for _ in range(2 * (os.cpu_count() or 1)):
        command += [":", "-n", "1", sys.executable, "-c", program]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    cores = [entry.name.partition("-")[2] for entry in tmp_path.iterdir()]
    assert cores == [str(len(os.sched_getaffinity(0)))] * (2 * (os.cpu_count() or 1) + 1)


@pytest.mark.parametrize("blind", [pytest.param(False, id="mpirun-ends"), slow(True, id="mpirun-hangs")])
def test_a_dead_rank_ends_the_group(
    trt_repository: Callable[..., Path], standins: Path, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    if blind:
        monkeypatch.setenv("STANDIN_MPI_BLIND", "1")
    server = TritonServer(trt_repository(2), ports=Ports(0, 0, 0), drain_seconds=1)
    with server:
        session = server.pid
        deadline = time.monotonic() + 60
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


RECIPES = [name for name in recipe_names() if load_recipe(name).engine.backend == "tensorrt_llm"]


@pytest.mark.parametrize("mode", ["servers", "orchestrator"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_lines_of_every_recipe(monkeypatch: pytest.MonkeyPatch, name: str, mode: str) -> None:
    """One tritonserver per rank that serves or works, and every GPU once.

    Sources: scripts/launch_triton_server.py of TensorRT-LLM 1.2 (mpirun, orchestrator's variables), and the mpirun of
    Open MPI 4.1, whose flags another test runs.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    recipe = load_recipe(name)
    ranks, replicas = recipe.world_size, recipe.serve.replicas
    apart = mode == "servers"
    deployment = Deployment(ranks, 1 if apart else replicas, Path("engine"), replicas if apart else 1)
    devices = server_devices(deployment, FOUR_4090D)
    launches = [plan(ranks, deployment.replicas, FOUR_4090D, group) for group in devices]
    assert len(launches) == deployment.servers
    named = [
        gpu for launch in launches for gpu in launch.environment.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")
    ]
    assert named == ["0", "1", "2", "3"]
    for launch in launches:
        words = launch.command
        starts_mpi = ranks > 1 or (not apart and replicas > 1)
        assert (words[: len(MPIRUN)] == MPIRUN) == starts_mpi
        orchestrates = not apart and replicas > 1
        assert words.count("/opt/tritonserver/bin/tritonserver") == (1 if orchestrates else ranks)
        assert ("TRTLLM_ORCHESTRATOR" in launch.environment) == orchestrates
        assert launch.environment.get("NCCL_P2P_DISABLE") == ("1" if ranks > 1 else None)

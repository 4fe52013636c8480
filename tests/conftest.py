"""Fixtures that several parts share: random models of any shape, the bundled model, built engines, a live server."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():  # before anything imports the Triton language: its kernels run interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import json
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it, before torch is loaded
# Matrices this small gain nothing from threads, and those wait for each other where other processes take the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from typing import Any, Literal

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from tests.command_line import MODULES as COMMANDS
from tests.ranks import SHARED, Nursery
from trtqwen.artifact.manifest import cached, write_manifest
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import ServerError
from trtqwen.engine.builder import build_engine
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe, VllmSettings
from trtqwen.triton.ports import Ports
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

for ignored in (signal.SIGINT, signal.SIGHUP):  # by what a shell starts in the background, or nohup, and its children
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL if ignored == signal.SIGHUP else signal.default_int_handler)

gc.disable()  # until the tests are collected: what imports make stays, and looking through it takes seconds

hypothesis.settings.register_profile("busy", deadline=None)  # no test depends on how fast the machine is
hypothesis.settings.load_profile("busy")

BACKEND = os.environ.get("TRTQWEN_TEST_BACKEND", "torch")  # `make test-vllm` sets it

RANKS = (
    "trtqwen.executor.plain_runner",
    "trtqwen.executor.attention.cpu",
    "trtqwen.executor.worker",
    "tests.executor.exchanges",
    "xgrammar",
)
GATEWAYS = ("trtqwen.gateway.__main__", "trtqwen.gateway.server")
TESTS = (
    "xdist.remote",
    "hypothesis.strategies",
    "openai",
    "redis.asyncio",
    "transformers.models.qwen2.modeling_qwen2",
)


def pytest_xdist_auto_num_workers() -> int:
    """One more than the cores that this process may use, since tests of servers often wait; eight at most."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(wrapper=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> Iterator[None]:
    """Fork the workers, and all that they fork, from one process with their imports."""
    home = Path(tempfile.mkdtemp(prefix="tests-"))
    nursery = Nursery(*COMMANDS, *GATEWAYS, *RANKS, *TESTS)
    nursery.listen(home / "nursery")
    os.environ[SHARED] = str(home / "nursery")
    for spec in specs:
        spec.python = f"{sys.executable} {Path(__file__).with_name('forked_worker.py')}"
    config.add_cleanup(nursery.stop)
    config.add_cleanup(lambda: shutil.rmtree(home))
    return (yield)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    started = Nursery(*RANKS)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def quick_ranks(nursery: Nursery) -> Iterator[None]:
    """Without GPUs, executors of the test process fork their ranks from one that has imported PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        # CUDA does not work in a fork of a process that has looked for devices.
        if not Path("/dev/nvidiactl").exists():
            patch.setattr("trtqwen.executor.executor.subprocess", nursery)
        yield


@pytest.fixture
def hf_directory(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random model and returns its directory."""

    def make(*, max_shard_size: str = "5GB", **options: Any) -> Path:
        from tests.models import random_model

        random_model(**options).save_pretrained(tmp_path / "hf", max_shard_size=max_shard_size)
        return tmp_path / "hf"

    return make


@pytest.fixture(scope="session")
def bundled_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the bundled model's float32 engine once for each set of options."""
    home = tmp_path_factory.mktemp("engines")

    def make(tp_size: int = 1, backend: Literal["torch", "vllm"] = "torch", **options: Any) -> Path:
        limits = {"max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 512, "tokens_per_block": 16}
        if backend == "vllm":
            limits["tokens_per_block"] = 32  # vLLM's attention on CPUs takes no less
        recipe = EngineRecipe(backend=backend, **(limits | options))
        plan = plan_conversion(MODEL, CheckpointRecipe(dtype="float32", tp_size=tp_size))
        checkpoint = home / f"checkpoint-tp{tp_size}"
        if not cached(checkpoint, "checkpoint", plan.key()):
            run_conversion(plan, checkpoint)
        engine = home / ("-".join([f"{backend}-tp{tp_size}", *(f"{key}={value}" for key, value in options.items())]))
        if not engine.exists():
            build_engine(checkpoint, recipe, engine)
        return engine

    return make


@pytest.fixture(scope="session")
def served_engine(bundled_engine: Callable[..., Path]) -> Path:
    """The engine behind the live servers: the bundled model's, of the backend that TRTQWEN_TEST_BACKEND names."""
    quick = {"vllm": VllmSettings(arguments={"enforce-eager": True})}  # compiling takes a minute
    return bundled_engine(backend=BACKEND, **(quick if BACKEND == "vllm" else {}))


@pytest.fixture(scope="session")
def served_repository(served_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of that engine: 16 requests in the batch, 512 tokens each."""
    output = tmp_path_factory.mktemp("served") / "repository"
    write_repository(served_engine, ServeRecipe(triton_max_batch_size=8), output)
    return output


@pytest.fixture(scope="session")
def served(served_repository: Path) -> Iterator[TritonServer]:
    """A Triton in front of that engine."""
    with TritonServer(served_repository, ports=Ports(0, 0, 0), drain_seconds=2) as running:
        yield running
        try:
            running.check()
        except ServerError as problem:
            if "Triton was ended by SIG" in problem.what:  # a crash, of which tests see only that a socket closes
                print(running.log.read_text("utf-8", "replace")[-4000:])
                raise


@pytest.fixture
def trt_repository(bundled_engine: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The repository of a TensorRT engine with some ranks and replicas; the engine's plans are empty."""

    def make(world_size: int, replicas: int = 1, replica_mode: str = "servers") -> Path:
        engine = Path(shutil.copytree(bundled_engine(world_size), tmp_path / "engine"))
        config = json.loads((engine / "config.json").read_text())
        (engine / "config.json").write_text(json.dumps(config | {"backend": "tensorrt_llm", "version": "1.2.1"}))
        for rank in range(world_size):
            (engine / f"rank{rank}.engine").touch()
        (engine / "manifest.json").unlink()
        write_manifest(engine, "engine", {}, {})
        serve = ServeRecipe.model_validate({"replicas": replicas, "replica_mode": replica_mode})
        write_repository(engine, serve, tmp_path / "repository")
        return tmp_path / "repository"

    return make


# Fixtures that start a Triton for the session, and the files that take them: those of one run in one process.
SERVERS = {
    "serve": ("deploy/test_monitoring.py", "deploy/test_top.py"),
    "served": (
        "bench/test_cli.py",
        "doctor/test_live.py",
        "gateway/test_examples.py",
        "gateway/test_fields.py",
        "gateway/test_models.py",
        "gateway/test_odd_requests.py",
        "gateway/test_openai.py",
        "gateway/test_schemas.py",
        "triton/test_serving.py",
    ),
    "stand_in_triton": (
        "gateway/test_apis.py",
        "gateway/test_chat_page.py",
        "gateway/test_clients.py",
        "gateway/test_fuzz.py",
        "gateway/test_http.py",
        "gateway/test_life.py",
        "gateway/test_limits.py",
        "gateway/test_queue.py",
        "gateway/test_rates.py",
        "gateway/test_stand_in.py",
        "gateway/test_websocket.py",
        "gateway/test_workers.py",
    ),
}
# Other files that take long, the longest first; those that wait for servers alternate with those that compute.
LONG = (
    "triton/test_server.py",
    "executor/test_executor.py",
    "bench/test_compare.py",
    "verify/test_verify.py",
    "batch/test_batch.py",
    "executor/cuda/test_kernels.py",
    "cli/test_cli.py",
    "containers/test_container_start.py",
    "gateway/test_models_command.py",
    "executor/test_requests.py",
    "deploy/test_kubernetes.py",
    "hf/test_layouts.py",
    "gateway/test_replicas.py",
    "executor/test_precisions.py",
    "vllm/test_serve.py",
    "test_build.py",
    "test_api.py",
    "engine/test_explain.py",
    "triton/test_launch.py",
    "executor/test_guided.py",
    "tune/test_bench.py",
    "cli/test_build.py",
    "gateway/test_two_gateways.py",
    "test_selftest.py",
    "vllm/test_migration.py",
    "checkpoint/test_convert.py",
    "triton/test_supervisor.py",
    "executor/cuda/test_model.py",
    "gateway/test_layouts.py",
    "verify/test_exported.py",
    "triton/test_service.py",
    "bench/test_load.py",
    "gateway/test_tracing.py",
    "tune/test_search.py",
    "engine/test_trtllm_builder.py",
    "simulate/test_measured.py",
    "vllm/test_executor.py",
    "deploy/test_rules.py",
)
PLACE_OF = {f"tests/{file}": place for place, file in enumerate(LONG)}
SERVER_OF = {f"tests/{file}": server for server, files in SERVERS.items() for file in files}


class _ByServer(LoadFileScheduling):  # type: ignore[misc,unused-ignore]
    """Gives a process all tests of a file, and all files that share a server."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return SERVER_OF.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Take the place of --dist=loadfile."""
    return _ByServer(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """Collect garbage from now on, without a look at modules and tests."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of servers first, and skip what only the embedded engine does while another one serves.

    Processes take file after file: the long ones come first, so that none of them runs alone at the end.
    """
    for item in items:
        file, taken = item.nodeid.partition("::")[0], SERVERS.keys() & getattr(item, "fixturenames", ())
        if taken and file not in SERVER_OF:
            raise pytest.UsageError(f"{file} shares a server: name it in SERVERS of tests/conftest.py")
    places = dict.fromkeys(SERVER_OF, -1) | PLACE_OF
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONG)))
    for item in items:
        mark = item.get_closest_marker("embedded")
        if mark is not None and BACKEND != "torch":
            item.add_marker(pytest.mark.skip(reason=f"not on {BACKEND}: {mark.args[0]}"))

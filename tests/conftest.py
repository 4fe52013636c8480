"""Fixtures that several parts share: random models of any shape, the bundled model, built engines, a live server."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():  # before anything imports the Triton language: its kernels run interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

import json
import shutil

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it, before torch is loaded

from collections.abc import Callable, Iterator
from typing import Any, Literal

import hypothesis
import pytest

from trtqwen.artifact.manifest import cached, write_manifest
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe, VllmSettings
from trtqwen.triton.ports import Ports
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

hypothesis.settings.register_profile("busy", deadline=None)  # no test depends on how fast the machine is
hypothesis.settings.load_profile("busy")

BACKEND = os.environ.get("TRTQWEN_TEST_BACKEND", "torch")  # `make test-vllm` sets it


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of servers first, and skip what only the embedded engine does while another one serves.

    Several processes take file after file: the long ones come first, so that none of them runs alone at the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("triton")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        mark = item.get_closest_marker("embedded")
        if mark is not None and BACKEND != "torch":
            item.add_marker(pytest.mark.skip(reason=f"not on {BACKEND}: {mark.args[0]}"))

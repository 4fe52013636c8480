"""Candidates on a real engine: built once for each set of fields, measured without a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.standins import vllm_server
from trtqwen.bench.setup import WorkloadOptions, make_workloads
from trtqwen.demo import MODEL
from trtqwen.diagnostics import EngineError
from trtqwen.executor.request import FinishReason, Request, Response
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import ServeRecipe, load_recipe
from trtqwen.simulate.run import Load
from trtqwen.tune.bench import EngineBench, ServerBench, executor_config, needs_servers, plan_candidate

CHANGES = ("checkpoint.tp_size=1", "engine.max_batch_size=4")


@pytest.mark.usefixtures("quick_ranks")
def test_measures_the_embedded_engine(tmp_path: Path) -> None:
    measured, other = make_workloads(WorkloadOptions("smoke", 9, output_tokens=8), Tokenizer(MODEL), 2)
    bench = EngineBench(measured, replace(other, asks=other.asks[:2]), Load(4), MODEL, tmp_path / "engines")
    recipe = load_recipe("qwen2-tiny-cpu", CHANGES)
    found = bench.run(recipe, 6)
    assert found.rates["success_rate"].avg == 1
    assert found.rates["request_count"].avg == 6
    assert found.distributions["output_sequence_length"].avg == 8
    assert found.rates["output_token_throughput"].avg > 0


class Refusing:
    """An engine that refuses everything."""

    alive = True

    def submit(self, request: Request, on_response: Any) -> None:
        on_response(Response(request_id=request.id, finish_reason=FinishReason.ERROR, error="out of memory"))


def test_an_engine_that_serves_nothing_is_a_failure(tmp_path: Path) -> None:
    [measured] = make_workloads(WorkloadOptions("smoke", 3), Tokenizer(MODEL), 1)
    bench = EngineBench(measured, replace(measured, asks=()), Load(2), MODEL, tmp_path)
    with pytest.raises(EngineError, match="no request was served: out of memory"):
        bench.measure(Refusing(), 3)  # type: ignore[arg-type]


def test_candidates_share_what_is_equal(tmp_path: Path) -> None:
    def plan(*changes: str) -> list[str]:
        made = plan_candidate(load_recipe("qwen2-tiny-cpu", changes), MODEL, tmp_path)
        return [stage.directory.name for stage in made.stages]

    own = plan()
    served, wider, split = (
        plan("serve.max_queue_size=3"),
        plan("engine.max_batch_size=8"),
        plan("checkpoint.tp_size=1"),
    )
    assert [one == other for one, other in zip(own, served, strict=True)] == [True, True, False]
    assert [one == other for one, other in zip(own, wider, strict=True)] == [True, False, False]
    assert [one == other for one, other in zip(own, split, strict=True)] == [False, False, False]


def test_an_engine_runs_as_the_recipe_serves_it() -> None:
    serve = ServeRecipe(
        enable_kv_cache_reuse=True, kv_cache_free_gpu_mem_fraction=0.5, max_tokens_in_paged_kv_cache=64
    )
    config = executor_config(serve)
    assert (config.enable_kv_cache_reuse, config.kv_cache_free_gpu_mem_fraction) == (True, 0.5)
    assert config.max_tokens_in_paged_kv_cache == 64


def test_replicas_and_tensorrt_engines_need_servers() -> None:
    assert needs_servers(load_recipe("qwen2.5-7b-bf16-tp4-4090d"), layouts=False)
    assert not needs_servers(load_recipe("qwen2-tiny-cpu"), layouts=False)


@pytest.mark.triton
def test_measures_vllm_behind_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTQWEN_VLLM_PYTHON", str(vllm_server.write_python(tmp_path / "python")))
    changes = ("engine.backend=vllm", "engine.tokens_per_block=32", "serve.batch_scheduler_policy=max_utilization")
    recipe = load_recipe("qwen2-tiny-cpu", ("checkpoint.tp_size=1", *changes))
    measured, other = make_workloads(WorkloadOptions("smoke", 6, output_tokens=8), Tokenizer(MODEL), 2)
    bench = ServerBench(measured, replace(other, asks=other.asks[:1]), Load(2), MODEL, tmp_path / "engines")
    assert needs_servers(recipe, layouts=False)
    found = bench.run(recipe, 4)
    assert found.rates["success_rate"].avg == 1
    assert found.rates["request_count"].avg == 4
    assert found.distributions["output_sequence_length"].avg == 8

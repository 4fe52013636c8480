"""The virtual engine: what it conserves, and that it schedules as the real engine does."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.recipes import make_recipe
from tests.slow import slow
from trtqwen.artifact.names import TOKENIZER_DIRECTORY
from trtqwen.bench.workload import Ask
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.config import ExecutorConfig, WorkerConfig, scheduler_config
from trtqwen.executor.device import choose_device
from trtqwen.executor.guided import GuidedDecoder
from trtqwen.executor.loop import StepLoop
from trtqwen.executor.parallel import SingleRank
from trtqwen.executor.plain_runner import make_runner
from trtqwen.executor.request import Command, Request
from trtqwen.executor.scheduler import Scheduler, SchedulerConfig
from trtqwen.recipe import load_recipe
from trtqwen.simulate.deployment import Deployment, deploy
from trtqwen.simulate.engine import StepWork, VirtualEngine
from trtqwen.simulate.play import play

Schedule = list[list[tuple[str, int, int]]]
LIMITS = {"max_seq_len": 64, "tokens_per_block": 4, "vocab_size": 100}


def recorded(scheduler: Scheduler) -> Schedule:
    """Every step that the scheduler chooses from now on: id, start and length of each chunk."""
    steps: Schedule = []
    schedule = scheduler.schedule

    def wrapped() -> Any:
        step = schedule()
        if step is not None:
            steps.append([(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in step.chunks])
        return step

    scheduler.schedule = wrapped  # type: ignore[method-assign]
    return steps


asks = st.lists(
    st.builds(
        Ask,
        st.lists(st.integers(0, 3), min_size=1, max_size=30).map(tuple),
        st.integers(1, 20),
        st.floats(0, 50),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(
    asks=asks,
    replicas=st.integers(1, 3),
    places=st.none() | st.integers(1, 8),
    overlap=st.booleans(),
    reuse=st.booleans(),
    policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
    blocks=st.integers(13, 40),
    token_seconds=st.sampled_from([0.0, 0.25]),
)
def test_no_token_is_lost_and_time_only_passes(
    asks: list[Ask],
    replicas: int,
    places: int | None,
    overlap: bool,
    reuse: bool,
    policy: Any,
    blocks: int,
    token_seconds: float,
) -> None:
    limits = SchedulerConfig(
        max_batch_size=4,
        max_num_tokens=16,
        num_blocks=blocks,
        batch_scheduler_policy=policy,
        enable_kv_cache_reuse=reuse,
        **LIMITS,  # type: ignore[arg-type]
    )
    engines = [VirtualEngine(limits, lambda work: 1 + work.tokens / 8, overlap=overlap) for _ in range(replicas)]
    done: list[int] = []
    records = play(asks, engines, concurrency=places, token_seconds=token_seconds, on_done=done.append)
    assert len(done) == len(asks)
    for ask, record in zip(asks, records, strict=True):
        assert record.ok
        assert record.prompt_tokens == len(ask.token_ids)
        assert record.output_tokens == len(record.pieces) == ask.max_tokens
        times = [record.due, record.sent, *(time for time, _ in record.pieces), record.ended]
        assert times == sorted(times)
        assert places is not None or record.due == ask.at
    for engine in engines:
        stats = engine.scheduler.stats()
        assert engine.scheduler.idle
        assert stats.used_blocks == engine.open_tokens == 0
        assert sum(work.tokens for work in engine.work) == stats.context_tokens + stats.generation_tokens
    if places is not None:
        moments = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
        open_now = 0
        for _, change in sorted(moments):
            open_now += change
            assert open_now <= places


def test_a_request_that_never_fits_is_an_error_and_the_others_go_on() -> None:
    limits = SchedulerConfig(max_batch_size=4, max_num_tokens=16, num_blocks=40, **LIMITS)  # type: ignore[arg-type]
    engine = VirtualEngine(limits, lambda work: 1.0, overlap=True)
    long, short = play([Ask((1,) * 64, 4), Ask((1, 2), 4)], [engine], concurrency=1)
    assert long.error is not None
    assert "exceeds maximum input length" in long.error
    assert short.ok


def test_requests_go_to_the_replica_with_the_fewest_tokens() -> None:
    limits = SchedulerConfig(max_batch_size=4, max_num_tokens=64, num_blocks=80, **LIMITS)  # type: ignore[arg-type]
    engines = [VirtualEngine(limits, lambda work: 1.0, overlap=False) for _ in range(2)]
    play([Ask((1,) * 40, 10), Ask((1,) * 5, 5), Ask((1,) * 5, 5)], engines, concurrency=3)
    assert [engine.scheduler.stats().context_tokens for engine in engines] == [40, 10]


SMALL = {"max_tokens_in_paged_kv_cache": 320}


@pytest.mark.parametrize(
    ("max_num_tokens", "settings", "overlap"),
    [
        slow(512, {}, False),
        slow(512, {}, True),
        slow(48, SMALL, False),
        (48, SMALL, True),
        slow(48, {**SMALL, "batch_scheduler_policy": "max_utilization"}, False),
        (48, {**SMALL, "batch_scheduler_policy": "max_utilization"}, True),
        (48, {**SMALL, "enable_kv_cache_reuse": True}, False),
        slow(48, {**SMALL, "enable_kv_cache_reuse": True}, True),
    ],
)
def test_schedules_as_the_real_engine_on_the_bundled_model(
    bundled_engine: Callable[..., Path], max_num_tokens: int, settings: dict[str, Any], overlap: bool
) -> None:
    directory = bundled_engine(max_num_tokens=max_num_tokens)
    executor = ExecutorConfig(device="cpu", attention="plain", **settings)
    config = read_engine_config(directory)
    worker = WorkerConfig(engine=directory, executor=executor, rank=0, rendezvous=directory / "none", threads=1)
    started = make_runner(worker, config, choose_device(config, executor, 0), SingleRank())
    limits = scheduler_config(config, executor, started.num_blocks)
    requests = [
        Request(
            id=str(index),
            input_token_ids=tuple(300 + n for n in range(5 + 23 * index % 90)),
            max_tokens=20 + 4 * index,
        )
        for index in range(9)
    ]
    commands: queue.Queue[Any] = queue.Queue()
    decoder = GuidedDecoder(directory / TOKENIZER_DIRECTORY, limits.vocab_size)
    loop = StepLoop(
        limits, started.runner, started.sampler, SingleRank(), decoder, commands, lambda events: None, overlap=overlap
    )
    real = recorded(loop._scheduler)
    for request in requests:
        loop._handle(Command(request=request))
    while not (loop._scheduler.idle and loop._flight is None):
        loop.step()

    virtual = VirtualEngine(limits, lambda work: 1.0, overlap=overlap)
    simulated = recorded(virtual.scheduler)
    for request in requests:
        virtual.add(request)
    virtual.start(0.0)
    while virtual.ends is not None:
        now = virtual.ends
        virtual.finish()
        virtual.start(now)
    assert real == simulated
    assert (virtual.scheduler.stats().paused > 0) == (limits.batch_scheduler_policy == "max_utilization")
    assert loop._scheduler.stats() == virtual.scheduler.stats()


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return deploy(make_recipe(checkpoint={"tp_size": 4, "dtype": "float16"}, serve={"replicas": 1}))


@given(
    tokens=st.integers(1, 8192),
    rows=st.integers(0, 256),
    pairs=st.floats(0, 1e7),
    kv_tokens=st.integers(0, 10**6),
    past=st.integers(0, 10**5),
)
def test_no_forecast_exceeds_the_bound(
    deployment: Deployment, tokens: int, rows: int, pairs: float, kv_tokens: int, past: int
) -> None:
    work = StepWork(tokens, min(rows, tokens), pairs, rows, kv_tokens, past)
    assert deployment.cost.forecast(work) >= deployment.cost.bound([work]).least


def test_short_steps_of_prompts_give_first_tokens_sooner_at_the_same_rate() -> None:
    """Eight clients whose requests end at the same time send the next ones at the same time."""
    found = deploy(load_recipe("qwen2.5-7b-bf16-torch-h100"))

    def median_and_end(share: int) -> tuple[float, float]:
        limits = replace(found.limits, context_share=share, enable_kv_cache_reuse=False)
        engine = VirtualEngine(limits, found.cost.forecast, overlap=True)
        records = play([Ask((1,) * 512, 64)] * 32, [engine], concurrency=8)
        return median(record.pieces[0][0] - record.sent for record in records), max(one.ended for one in records)

    assert found.limits.context_share == 1024
    (shared, shared_end), (whole, whole_end) = median_and_end(1024), median_and_end(0)
    assert shared < 0.75 * whole
    assert shared_end < 1.01 * whole_end

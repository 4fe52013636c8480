"""What lives as long as the gateway: the model's facts, the replicas, the gate in front of them, and their watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from trtqwen.gateway.admission.admission import Admission, Capacity, QueueLimits
from trtqwen.gateway.admission.gate import Gate
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.generation.generator import Generator
from trtqwen.gateway.generation.health import Monitor
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import ServedModel

_QUEUED_REQUESTS, _QUEUED_TOKENS = 1024, 1 << 21  # how long they wait is bounded too, by queue_seconds
Connect = Callable[[str], Replica]  # makes the replica of an address
_HEADROOM = 8  # one request in so many waits inside the engine, so that its batch is full again at once


@dataclass(frozen=True)
class Runtime:
    """What the routes work with."""

    config: GatewayConfig
    model: ServedModel
    template: ChatTemplate | None
    metrics: Metrics
    gate: Gate
    generator: Generator
    monitor: Monitor


def plan_admission(config: GatewayConfig, model: ServedModel) -> Admission:
    """Limits from the engines': what their batches and KV caches hold, with a little more to keep them full."""
    limits = model.limits
    batch = model.copies * limits.max_batch_size
    cache = model.copies * model.cache_tokens(config.kv_cache_tokens)
    capacity = Capacity(batch + max(1, batch // _HEADROOM), cache + max(1, cache // _HEADROOM))
    replicas = len(config.triton)
    requests, tokens = max(_QUEUED_REQUESTS, 2 * replicas * batch), max(_QUEUED_TOKENS, 2 * replicas * cache)
    queue = QueueLimits(
        requests=requests if config.max_queued_requests is None else config.max_queued_requests,
        tokens=tokens if config.max_queued_tokens is None else config.max_queued_tokens,
    )
    return Admission(replicas, capacity, queue)


@asynccontextmanager
async def running(
    config: GatewayConfig,
    model: ServedModel,
    template: ChatTemplate | None,
    metrics: Metrics,
    connect: Connect = Replica,
) -> AsyncIterator[Runtime]:
    """Connect to the replicas and watch them until the block ends."""
    replicas = [connect(address) for address in config.triton]
    gate = Gate(plan_admission(config, model), metrics, config.queue_seconds)
    monitor = Monitor(
        replicas,
        gate,
        metrics,
        probe_seconds=config.probe_seconds,
        stall_seconds=config.stall_seconds,
        prompt_tokens_per_second=config.prompt_tokens_per_second,
    )
    _show(metrics, replicas, gate, monitor)
    generator = Generator(model, replicas, gate, metrics, config.request_seconds, monitor.suspect)
    watch = asyncio.create_task(monitor.watch())
    try:
        yield Runtime(config, model, template, metrics, gate, generator, monitor)
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        for replica in replicas:
            await replica.close()


def _show(metrics: Metrics, replicas: Sequence[Replica], gate: Gate, monitor: Monitor) -> None:
    """Let the gauges whose values are known elsewhere ask for them when they are read."""
    metrics.queue_age_seconds.set_function(lambda: gate.queue_age)
    metrics.ready.set_function(lambda: float(monitor.ready and not gate.draining))
    metrics.picker_waiting.set_function(lambda: metrics.value("queued"))
    metrics.picker_running.set_function(lambda: metrics.value("in_flight"))
    metrics.picker_cache.set_function(lambda: gate.cache_share)
    for number, replica in enumerate(replicas):
        metrics.replica_sequences.labels(replica.address)
        metrics.cached_prompt_tokens.labels(replica.address)
        metrics.replica_in_flight.labels(replica.address).set_function(partial(_running, gate, number, 0))
        metrics.replica_in_flight_tokens.labels(replica.address).set_function(partial(_running, gate, number, 1))


def _running(gate: Gate, number: int, which: int) -> float:
    return float(gate.running(number)[which])

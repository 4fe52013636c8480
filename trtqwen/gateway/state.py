"""What lives as long as the gateway: the model's facts, the replicas, the gate in front of them, and their watch."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trtqwen.gateway.admission.admission import Admission, Capacity, QueueLimits
from trtqwen.gateway.admission.broker import Link, SharedGate
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
_PROCESS_SECONDS = 2  # between two looks at memory and CPU time
_HEADROOM = 8  # one request in so many waits inside the engine, so that its batch is full again at once
_log = logging.getLogger(__name__)


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
    link: Link | None = None,
    *,
    keys: int = 0,
) -> AsyncIterator[Runtime]:
    """Connect to the replicas and watch them until the block ends.

    Args:
        link: to the broker, in one of several workers.
        keys: how many API keys there are.
    """
    replicas = [connect(address) for address in config.triton]
    gate = own_gate(config, model, metrics, keys) if link is None else SharedGate(link)
    monitor = Monitor(
        replicas,
        gate,
        metrics,
        probe_seconds=config.probe_seconds,
        stall_seconds=config.stall_seconds,
        prompt_tokens_per_second=config.prompt_tokens_per_second,
    )
    for replica in replicas:  # a counter that nobody has counted is missing, not 0
        metrics.replica_sequences.labels(replica.address)
        metrics.cached_prompt_tokens.labels(replica.address)
    by_prefix = (
        model.reuses_kv_cache and len(replicas) > 1 if config.prefix_routing is None else config.prefix_routing
    )
    isolates = keys > 1 and not config.share_kv_cache
    if isolates and model.reuses_kv_cache and "cache_salt" not in model.extensions:
        _log.warning("API keys share the KV cache of this engine: by timing, one finds out prompts of another")
    generator = Generator(
        model, replicas, gate, metrics, config.request_seconds, monitor.suspect, by_prefix, isolates_keys=isolates
    )
    tasks = [asyncio.create_task(monitor.watch()), asyncio.create_task(_watch_process(metrics))]
    if isinstance(gate, SharedGate):
        tasks.append(asyncio.create_task(gate.listen()))
    try:
        yield Runtime(config, model, template, metrics, gate, generator, monitor)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for replica in replicas:
            await replica.close()


def own_gate(config: GatewayConfig, model: ServedModel, metrics: Metrics, keys: int) -> Gate:
    """The gate of a gateway's only process, or of the one that its workers ask.

    Args:
        keys: how many API keys there are.
    """
    admission, share = plan_admission(config, model), config.key_share if keys > 1 else 1
    return Gate(admission, metrics, config.queue_seconds, config.triton, config.throttle_seconds, share)


async def _watch_process(metrics: Metrics) -> None:
    """Tell this process's memory and CPU time until cancelled."""
    counted = 0.0
    while True:
        used = time.process_time()
        metrics.cpu_seconds.inc(used - counted)
        counted = used
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        metrics.resident_bytes.set(pages * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(_PROCESS_SECONDS)

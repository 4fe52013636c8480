"""The state of one engine in the gateway: model, replicas, gate and health checks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from trtqwen.gateway.admission.admission import Capacity, QueueLimits
from trtqwen.gateway.admission.gate import Gate, GatePlan
from trtqwen.gateway.admission.shared import Link, SharedGate
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.health import Monitor
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import ServedModel

_QUEUED_REQUESTS, _QUEUED_TOKENS = 1024, 1 << 21  # how long they wait is bounded too, by queue_seconds
Connect = Callable[[str], Replica]  # makes the replica of an address
_HEADROOM = 8  # one request in this many waits inside the engine, so that its batch is full again at once
_log = logging.getLogger(__name__)
_CANCEL_SECONDS = 1.0  # until a task that goes on is cancelled again


@dataclass(frozen=True)
class Runtime:
    """One engine, as the routes use it. Its config names the engine's repository and addresses."""

    config: GatewayConfig
    model: ServedModel
    template: ChatTemplate | None
    metrics: Metrics
    gate: Gate
    generator: AnswerGenerator
    monitor: Monitor


def plan_gate(config: GatewayConfig, model: ServedModel, keys: int = 0) -> GatePlan:
    """Return the gate's limits: the engine's batches and KV caches, with a margin that keeps them full.

    Args:
        keys: how many API keys there are.
    """
    limits = model.limits
    batch = model.instances * limits.max_batch_size
    cache = model.instances * model.cache_tokens(config.kv_cache_tokens)
    capacity = Capacity(batch + max(1, batch // _HEADROOM), cache + max(1, cache // _HEADROOM))
    replicas = len(config.triton)
    requests, tokens = max(_QUEUED_REQUESTS, 2 * replicas * batch), max(_QUEUED_TOKENS, 2 * replicas * cache)
    queue = QueueLimits(
        requests=requests if config.max_queued_requests is None else config.max_queued_requests,
        tokens=tokens if config.max_queued_tokens is None else config.max_queued_tokens,
    )
    share = config.key_share if keys > 1 else 1
    return GatePlan(config.triton, capacity, queue, config.queue_seconds, config.throttle_seconds, share)


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
    identity: str = "",
    on_change: Callable[[], None] = lambda: None,
) -> AsyncIterator[Runtime]:
    """Connect to the replicas and watch them until the block ends.

    Args:
        link: to the broker, in one of several workers.
        keys: how many API keys there are.
        identity: names the engine, the same in all workers.
        on_change: called when a replica may have begun or ceased to work.
    """
    replicas = [connect(address) for address in config.triton]
    plan = plan_gate(config, model, keys)
    gate = plan.build(metrics) if link is None else SharedGate(link, identity, plan)
    monitor = Monitor(
        replicas,
        gate,
        metrics,
        probe_seconds=config.probe_seconds,
        stall_seconds=config.stall_seconds,
        prompt_tokens_per_second=config.prompt_tokens_per_second,
        on_change=on_change,
    )
    for replica in replicas:  # a counter without counts is missing, not 0
        metrics.replica_sequences.labels(replica.address)
        metrics.cached_prompt_tokens.labels(replica.address)
    by_prefix = (
        model.reuses_kv_cache and len(replicas) > 1 if config.prefix_routing is None else config.prefix_routing
    )
    isolates = keys > 1 and not config.share_kv_cache
    if isolates and model.reuses_kv_cache and "cache_salt" not in model.extensions:
        _log.warning("API keys share the KV cache of this engine: by timing, one finds out prompts of another")
    generator = AnswerGenerator(
        model, replicas, gate, metrics, config.request_seconds, monitor.suspect, by_prefix, isolates_keys=isolates
    )
    watching = asyncio.create_task(monitor.watch())
    try:
        yield Runtime(config, model, template, metrics, gate, generator, monitor)
    finally:
        while not watching.done():  # a probe that fails at the moment of a cancellation tells of its failure only
            watching.cancel()
            await asyncio.wait((watching,), timeout=_CANCEL_SECONDS)
        if not watching.cancelled():
            watching.result()
        for replica in replicas:
            await replica.close()
            metrics.replica_up.labels(replica.address).set(0)
        with suppress(ConnectionError):  # the broker may have ended before its workers
            gate.close()

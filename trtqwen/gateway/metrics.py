"""The gateway's own metrics, for Prometheus."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from trtqwen.gateway.supervision import Supervision

# Set before prometheus_client is imported, it makes all processes with the same value count together.
SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

_Mode = Literal["mostrecent", "livesum"]  # how the values of several processes become one
_TEXT_SHARE = 0.1  # of a core, that making the text may take
_MOST_ALLOWED = 0.5  # seconds of it at once
_PROCESS_SECONDS = 2  # between two looks at memory and CPU time
_PREFIX = "trtqwen_gateway"
_LATENCY = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 600)  # seconds
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)  # seconds
_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768)

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Load:
    """The load of an engine: running and waiting sequences.

    Attributes:
        since: arrival of the sequence that waits longest, in Unix time; 0 if none waits.
        cache_tokens: tokens that fit into the engine's KV cache.
    """

    in_flight: int
    in_flight_tokens: int
    queued: int
    queued_tokens: int
    since: float
    cache_tokens: int


class Metrics:
    """Counters, gauges and histograms of one gateway; labels take few values, never a request's own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._text, self._allowance, self._made_at = b"", _MOST_ALLOWED, time.monotonic()
        self._loads: dict[object, Load] = {}
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", _LATENCY
        )
        self.inter_token_seconds = self._histogram(
            "inter_token_seconds", "Between two pieces of an answer as the engine sends them", _INTER_TOKEN
        )
        self.queue_seconds = self._histogram("queue_seconds", "Waiting for a turn on the engine", _LATENCY)
        self.request_seconds = self._histogram("request_seconds", "From a request's arrival to its end", _LATENCY)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.request_output_tokens = self._histogram("request_output_tokens", "Tokens of an answer", _TOKENS)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens sent to the engine")
        self.output_tokens = self._counter("output_tokens", "Tokens received from the engine")
        self.finished = self._counter("finished", "Answers, by why they ended", "reason")
        self.refused = self._counter("refused", "Requests that ended with an error, by its code", "status", "code")
        self.nan_guard = self._counter("nan_guard", "Answers ended because the engine sent only token 0")
        self.guided_violations = self._counter(
            "guided_violations", "Complete answers that break the JSON schema they were held to"
        )
        self.probes = self._counter("probes", "One-token requests that ask whether the engine works", "result")
        self.key_requests = self._counter("key_requests", "Requests by API key and status", "key", "status")
        self.key_tokens = self._counter("key_tokens", "Prompt and answer tokens by API key", "key")
        self.in_flight = self._gauge("in_flight", "Sequences on the engine")
        self.in_flight_tokens = self._gauge("in_flight_tokens", "Tokens of the sequences on the engine, at most")
        self.queued = self._gauge("queued", "Sequences that wait for a turn")
        self.queued_tokens = self._gauge("queued_tokens", "Tokens of the sequences that wait, at most")
        self.restarts = self._gauge("restarts", "How often `trtqwen serve` has started an engine or gateway again")
        self.restarting = self._gauge("restarting", "Whether `trtqwen serve` is starting an engine again")
        self.queue_since = self._gauge(
            "queue_since_timestamp_seconds",
            "When the sequence arrived that waits longest, in Unix time; 0 if none waits",
        )
        self.ready = self._gauge("ready", "Whether new requests are taken and a replica answers")
        self.replica_up = self._gauge("replica_up", "Whether a replica answers", "replica")
        self.replica_in_flight = self._gauge("replica_in_flight", "Sequences on a replica", "replica")
        self.replica_in_flight_tokens = self._gauge(
            "replica_in_flight_tokens", "Tokens of the sequences on a replica, at most", "replica"
        )
        self.replica_sequences = self._counter("replica_sequences", "Sequences sent to a replica", "replica")
        self.cached_prompt_tokens = self._counter(
            "cached_prompt_tokens", "Prompt tokens that a replica found in its KV cache", "replica"
        )
        self.resident_bytes = self._gauge(
            "resident_memory_bytes", "Resident memory of the gateway's processes", mode="livesum"
        )
        self.cpu_seconds = self._counter("cpu_seconds", "CPU time of the gateway's processes")
        # The names that the endpoint picker of the Gateway API inference extension reads by default.
        self.picker_waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait", prefix="")
        self.picker_running = self._gauge("vllm:num_requests_running", "Sequences on the engine", prefix="")
        self.picker_cache = self._gauge(
            "vllm:kv_cache_usage_perc", "Share of the KV cache that is reserved, 0 to 1", prefix=""
        )

        target = ("model", "target", "role")
        self.model_up = self._gauge("model_up", "Whether a target of a model answers", "model")
        self.target_weight = self._gauge(
            "target_weight", "Share of a model's requests that a target answers, 0 to 1", "model", "target"
        )
        self.target_stable = self._gauge(
            "target_stable", "Whether the model's other targets are compared with this one", "model", "target"
        )
        self.target_requests = self._counter("target_requests", "Requests of a target by outcome", *target, "outcome")
        self.target_tokens = self._counter("target_output_tokens", "Tokens of a target's answers", *target)
        self.target_first_token_seconds = self._histogram(
            "target_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            _LATENCY,
            *target,
        )
        self.target_token_seconds = self._histogram(
            "target_token_seconds", "Mean time between the tokens of an answer", _INTER_TOKEN, *target
        )
        self.target_seconds = self._histogram("target_request_seconds", "Time of an answer", _LATENCY, *target)
        self.shadow_answers = self._counter(
            "shadow_answers",
            "Copies of requests by what became of them: same or different text, failed, unpaired, skipped",
            "model",
            "target",
            "sampling",
            "result",
        )
        self.shadow_agreement = self._histogram(
            "shadow_agreement", "Share of an answer's text that a shadow's answer begins with", _SHARES, *target[:2]
        )

    def show_load(self, source: object, load: Load) -> None:
        """Set the load of one gate's engine; the gauges are sums over all engines."""
        self._loads[source] = load
        self._sum_loads()

    def forget_load(self, source: object) -> None:
        """Remove the load of a gate's engine."""
        if self._loads.pop(source, None) is not None:
            self._sum_loads()

    def _sum_loads(self) -> None:
        loads = self._loads.values()
        in_flight, queued = sum(load.in_flight for load in loads), sum(load.queued for load in loads)
        tokens, room = sum(load.in_flight_tokens for load in loads), sum(load.cache_tokens for load in loads)
        self.in_flight.set(in_flight)
        self.in_flight_tokens.set(tokens)
        self.queued.set(queued)
        self.queued_tokens.set(sum(load.queued_tokens for load in loads))
        self.queue_since.set(min((load.since for load in loads if load.since), default=0))
        self.picker_waiting.set(queued)
        self.picker_running.set(in_flight)
        self.picker_cache.set(tokens / room if room else 0)

    def set_supervision(self, supervision: Supervision) -> None:
        """Set the supervisor's state."""
        self.restarts.set(supervision.restarts)
        self.restarting.set(supervision.state == "restarting")

    def text(self) -> bytes:
        """Everything in Prometheus' text format.

        Requests for it need no key, so a flood of them must be cheap: beyond a tenth of one core, they all get the
        text that was made last.
        """
        now = time.monotonic()
        self._allowance = min(_MOST_ALLOWED, self._allowance + _TEXT_SHARE * (now - self._made_at))
        self._made_at = now
        if self._allowance > 0 or not self._text:
            self._text = generate_latest(self._everybody())
            self._allowance -= time.monotonic() - now
        return self._text

    def _everybody(self) -> CollectorRegistry:
        """The metrics of all processes of this gateway."""
        if SHARED_DIRECTORY not in os.environ:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self._registry)

    def _gauge(
        self, name: str, text: str, *labels: str, prefix: str = f"{_PREFIX}_", mode: _Mode = "mostrecent"
    ) -> Gauge:
        return Gauge(f"{prefix}{name}", text, labels, registry=self._registry, multiprocess_mode=mode)


async def watch_process(metrics: Metrics) -> None:
    """Update this process's memory and CPU time until cancelled."""
    counted = 0.0
    while True:
        used = time.process_time()
        metrics.cpu_seconds.inc(used - counted)
        counted = used
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        metrics.resident_bytes.set(pages * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(_PROCESS_SECONDS)

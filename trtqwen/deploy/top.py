"""The figures of `trtqwen top`: those of the dashboards, read from the metrics endpoints."""

from __future__ import annotations

import time
import urllib.request
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import inf, isnan
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from trtqwen.diagnostics import ServerError

_GATEWAY = "trtqwen_gateway"
_TIMEOUT = 5.0  # seconds for one endpoint
_PERCENTS = (50, 95, 99)
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scrape:
    """The samples of one endpoint.

    Attributes:
        at: seconds of the monotonic clock.
        samples: values by name and sorted labels.
    """

    at: float
    samples: Mapping[tuple[str, Labels], float]

    def select(self, name: str, **labels: str) -> dict[Labels, float]:
        """Return the samples of a name that have these labels."""
        wanted = set(labels.items())
        return {key[1]: value for key, value in self.samples.items() if key[0] == name and wanted <= set(key[1])}

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of the samples; None if there is none."""
        found = self.select(name, **labels)
        return sum(found.values()) if found else None


def read_scrape(text: str, at: float) -> Scrape:
    """Parse Prometheus' text format."""
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
    }
    return Scrape(at, samples)


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """The quantile of a histogram, interpolated as Prometheus' `histogram_quantile` does.

    Args:
        buckets: cumulative counts by upper bound, infinity among them.

    Returns:
        None for an empty histogram.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    rank = share * buckets[bounds[-1]]
    for below, bound in pairwise([0.0, *bounds]):
        count = buckets[bound]
        if count >= rank:
            if bound == inf:
                return below
            before = buckets.get(below, 0.0) if below else 0.0
            return below + (bound - below) * (rank - before) / (count - before) if count > before else bound
    return bounds[-1]


@dataclass(frozen=True)
class ReplicaRow:
    name: str
    up: bool
    in_flight: float
    tokens: float


@dataclass(frozen=True)
class EngineRow:
    """One Triton server.

    Attributes:
        kv_cache: share of the KV cache blocks in use.
        steps: of the engine, per second.
    """

    name: str
    scheduled: float
    batch: float
    waiting: float
    kv_cache: float
    steps: float | None
    host_memory: float | None


@dataclass(frozen=True)
class GpuRow:
    """One GPU; shares are 0 to 1."""

    name: str
    utilization: float
    memory: float
    watts: float | None


@dataclass(frozen=True)
class Glance:
    """The state of a service. Rates are per second over the window; latencies are percentiles in seconds.

    Attributes:
        seconds: the window's length.
        silent: endpoints without an answer.
    """

    seconds: float
    ready: bool
    in_flight: float
    queued: float
    queue_age: float
    requests: float | None
    prompt_tokens: float | None
    output_tokens: float | None
    refusals: float | None
    errors: float | None
    latencies: dict[str, dict[str, float | None]]
    replicas: tuple[ReplicaRow, ...]
    engines: tuple[EngineRow, ...]
    gpus: tuple[GpuRow, ...]
    silent: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Watch:
    """Scrapes gateways and Triton servers repeatedly.

    Args:
        gateways, tritons: URLs of metrics.
        window: seconds over which rates and percentiles are taken.
    """

    gateways: Sequence[str]
    tritons: Sequence[str]
    window: float = 30.0
    _history: dict[str, deque[Scrape]] = field(default_factory=dict)
    _silent: tuple[str, ...] = ()

    def look(self) -> Glance:
        """Scrape all endpoints once and sum up the window.

        Raises:
            ServerError: if no endpoint answers.
        """
        urls = [*self.gateways, *self.tritons]
        with ThreadPoolExecutor(len(urls)) as pool:
            texts = dict(zip(urls, pool.map(_fetch, urls), strict=True))
        self._silent = tuple(url for url, text in texts.items() if text is None)
        if len(self._silent) == len(urls):
            raise ServerError(
                f"{', '.join(urls)}: no metrics here", "start `trtqwen serve`, or pass --url and --triton"
            )
        for url, text in texts.items():
            history = self._history.setdefault(url, deque())
            if text is None:
                history.clear()
                continue
            history.append(read_scrape(text, time.monotonic()))
            while len(history) > 2 and history[1].at <= history[-1].at - self.window:
                history.popleft()
        return self._glance()

    def _glance(self) -> Glance:
        gateways = [history for url in self.gateways if (history := self._history[url])]
        now = time.time()
        waiting = [
            since for history in gateways if (since := history[-1].total(f"{_GATEWAY}_queue_since_timestamp_seconds"))
        ]
        refused = f"{_GATEWAY}_refused_total"
        return Glance(
            seconds=max((history[-1].at - history[0].at for history in self._history.values() if history), default=0),
            ready=any(history[-1].total(f"{_GATEWAY}_ready") for history in gateways),
            in_flight=_sum(history[-1].total(f"{_GATEWAY}_in_flight") for history in gateways) or 0,
            queued=_sum(history[-1].total(f"{_GATEWAY}_queued") for history in gateways) or 0,
            queue_age=max((now - since for since in waiting), default=0.0),
            requests=_sum(_rate(history, f"{_GATEWAY}_request_seconds_count") for history in gateways),
            prompt_tokens=_sum(_rate(history, f"{_GATEWAY}_prompt_tokens_total") for history in gateways),
            output_tokens=_sum(_rate(history, f"{_GATEWAY}_output_tokens_total") for history in gateways),
            refusals=_sum(_rate(history, refused, lambda status: status == "429") for history in gateways),
            errors=_sum(_rate(history, refused, lambda status: status >= "500") for history in gateways),
            latencies={
                title: _percentiles(gateways, f"{_GATEWAY}_{name}_seconds_bucket")
                for title, name in _LATENCIES.items()
            },
            replicas=_replicas(gateways),
            engines=tuple(
                row for url in self.tritons if (history := self._history[url]) and (row := _engine(url, history))
            ),
            gpus=_gpus([history[-1] for url in self.tritons if (history := self._history[url])]),
            silent=self._silent,
        )


_LATENCIES = {
    "request": "request",
    "first token": "time_to_first_token",
    "inter-token": "inter_token",
    "queue": "queue",
}


def metrics_url(address: str) -> str:
    """The URL of the metrics of a gateway or a Triton server, for `host:port` or a URL."""
    url = address if "://" in address else f"http://{address}"
    return url if url.rstrip("/").endswith("/metrics") else f"{url.rstrip('/')}/metrics"


def _fetch(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            text: str = answer.read().decode("utf-8", "replace")
            return text
    except (OSError, ValueError):
        return None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _rate(history: deque[Scrape], name: str, status: Any = None) -> float | None:
    """Return a counter's rate per second; None with a single scrape. A restarted process counts from 0."""
    if len(history) < 2:
        return None
    first, last = history[0], history[-1]
    before = first.select(name)
    grown = 0.0
    for labels, value in last.select(name).items():
        if status is None or status(dict(labels).get("status", "")):
            old = before.get(labels, 0.0)
            grown += value - old if value >= old else value
    return grown / (last.at - first.at)


def _percentiles(gateways: Sequence[deque[Scrape]], name: str) -> dict[str, float | None]:
    """Return the latency percentiles of all gateways over the window; with a single scrape, since their start."""
    buckets: dict[float, float] = {}
    for history in gateways:
        before = history[0].select(name) if len(history) > 1 else {}
        for labels, value in history[-1].select(name).items():
            bound = float(dict(labels)["le"])
            old = before.get(labels, 0.0)
            buckets[bound] = buckets.get(bound, 0.0) + (value - old if value >= old else value)
    return {f"p{percent}": quantile(percent / 100, buckets) for percent in _PERCENTS}


def _replicas(gateways: Sequence[deque[Scrape]]) -> tuple[ReplicaRow, ...]:
    rows: dict[str, ReplicaRow] = {}
    for history in gateways:
        last = history[-1]
        for labels, up in last.select(f"{_GATEWAY}_replica_up").items():
            name = dict(labels)["replica"]
            known = rows.get(name, ReplicaRow(name, False, 0, 0))
            rows[name] = ReplicaRow(
                name,
                known.up or bool(up),
                known.in_flight + (last.total(f"{_GATEWAY}_replica_in_flight", replica=name) or 0),
                known.tokens + (last.total(f"{_GATEWAY}_replica_in_flight_tokens", replica=name) or 0),
            )
    return tuple(rows.values())


def _engine(url: str, history: deque[Scrape]) -> EngineRow | None:
    last = history[-1]
    scheduled = last.total("nv_trt_llm_request_metrics", request_type="scheduled")
    if scheduled is None:
        return None
    blocks = {
        kind: last.total("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type=kind) or 0.0
        for kind in ("used", "max")
    }
    steps = None
    if len(history) > 1:
        counters = [
            scrape.total("nv_trt_llm_general_metrics", general_type="iteration_counter") or 0.0
            for scrape in (history[0], last)
        ]
        steps = max(0.0, counters[1] - counters[0]) / (last.at - history[0].at)
    total = last.total("nv_cpu_memory_total_bytes")
    used = last.total("nv_cpu_memory_used_bytes")
    return EngineRow(
        name=url.removeprefix("http://").removesuffix("/metrics"),
        scheduled=scheduled,
        batch=last.total("nv_trt_llm_request_metrics", request_type="max") or 0.0,
        waiting=last.total("nv_trt_llm_request_metrics", request_type="waiting") or 0.0,
        kv_cache=blocks["used"] / blocks["max"] if blocks["max"] else 0.0,
        steps=steps,
        host_memory=used / total if total and used is not None else None,
    )


def _gpus(scrapes: Sequence[Scrape]) -> tuple[GpuRow, ...]:
    """Return each GPU once, by UUID: several Triton servers may report the same GPU."""
    rows: dict[str, GpuRow] = {}
    for scrape in scrapes:
        for labels, utilization in scrape.select("nv_gpu_utilization").items():
            name = dict(labels).get("gpu_uuid", "")
            total = scrape.total("nv_gpu_memory_total_bytes", gpu_uuid=name)
            used = scrape.total("nv_gpu_memory_used_bytes", gpu_uuid=name)
            watts = scrape.total("nv_gpu_power_usage", gpu_uuid=name)
            share = used / total if total and used is not None else 0.0
            if not isnan(utilization):
                rows[name] = GpuRow(name, utilization, share, watts)
    return tuple(rows.values())

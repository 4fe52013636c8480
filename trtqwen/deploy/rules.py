"""Prometheus' recording and alert rules: one set for all engines.

The recording rules turn the names of different exporters into one: GPU figures come from Triton (`nv_gpu_*`) or from
NVIDIA's DCGM exporter (`DCGM_FI_*`), engine figures from the `nv_trt_llm_*` families that TensorRT-LLM's backend and
trtqwen's own engines publish. Dashboards, alerts and autoscalers use the recorded names.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from trtqwen.diagnostics import InputError

RUNBOOK = "docs/monitoring.md"
_GATEWAY = "trtqwen_gateway"
_QUEUE_AGE = f"max(time() - ({_GATEWAY}_queue_since_timestamp_seconds > 0)) or vector(0)"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the alerts.

    Attributes:
        latency_p99_seconds, latency_mean_seconds: of whole requests.
        first_token_p99_seconds: from arrival to the first token.
        gpu_utilization: of one GPU, 0 to 1.
        memory_reserve: free share of KV cache blocks, of GPU memory and of host memory, 0 to 1.
        queue_age_seconds: waiting time of the request that waits longest.
        error_ratio: share of requests that end with a server error.
        refusal_ratio: share of requests refused because the server is full or a key's rate is used up.
        leak_bytes_per_hour: growth of a process's resident memory.
    """

    latency_p99_seconds: float = 2.0
    latency_mean_seconds: float = 3.0
    first_token_p99_seconds: float = 2.0
    gpu_utilization: float = 0.8
    memory_reserve: float = 0.1
    queue_age_seconds: float = 10.0
    error_ratio: float = 0.05
    refusal_ratio: float = 0.1
    leak_bytes_per_hour: float = 100e6

    def changed(self, changes: list[str]) -> Thresholds:
        """These thresholds with some replaced.

        Args:
            changes: each `NAME=VALUE`.

        Raises:
            InputError: if a name is unknown or a value is not a positive number.
        """
        names = [field.name for field in fields(self)]
        result = self
        for change in changes:
            name, _, value = change.partition("=")
            if name not in names:
                raise InputError(f"--threshold {change}: {name!r} is unknown", f"name one of {', '.join(names)}")
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if not 0 < number < float("inf"):
                raise InputError(f"--threshold {change}: {value!r} is not a positive number", "give NAME=NUMBER")
            result = replace(result, **{name: number})
        return result


@dataclass(frozen=True)
class Recording:
    """A recorded query."""

    name: str
    query: str


@dataclass(frozen=True)
class Alert:
    """An alert rule.

    Attributes:
        query: fires for every series that it returns.
        wait: how long the query must return the series before the alert fires, as Prometheus writes durations.
        summary: one sentence; `{{ $value }}` and `{{ $labels.x }}` are Prometheus' own.
        hint: what to do.
    """

    name: str
    query: str
    wait: str
    severity: Literal["warning", "critical"]
    summary: str
    hint: str


def _quantile(share: float, histogram: str, window: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({_GATEWAY}_{histogram}_bucket[{window}])))"


def _mean(histogram: str, window: str) -> str:
    name = f"{_GATEWAY}_{histogram}"
    return f"sum(rate({name}_sum[{window}])) / sum(rate({name}_count[{window}]))"


def _gpu(triton: str, dcgm: str) -> str:
    """Return a GPU figure by the GPU's UUID, from the exporter that has it."""
    one = f'label_replace({triton}, "gpu", "$1", "gpu_uuid", "(.*)")'
    other = f'label_replace({dcgm}, "gpu", "$1", "UUID", "(.*)")'
    return f"max by (gpu) ({one} or {other})"


def _engine(family: str, label: str, value: str) -> str:
    return f'sum by (instance) (nv_trt_llm_{family}_metrics{{{label}="{value}"}})'


def recordings() -> tuple[Recording, ...]:
    """All recording rules, in an order in which each uses only those before it."""
    ended = f"(sum(rate({_GATEWAY}_finished_total[5m])) or vector(0))"
    refused = f"rate({_GATEWAY}_refused_total"
    all_refused = f"(sum({refused}[5m])) or vector(0))"
    rules = [
        *(
            Recording(f"trtqwen:{histogram}:p{percent}_5m", _quantile(percent / 100, histogram, "5m"))
            for histogram in (
                "request_seconds",
                "time_to_first_token_seconds",
                "inter_token_seconds",
                "queue_seconds",
            )
            for percent in (50, 95, 99)
        ),
        Recording("trtqwen:request_seconds:mean_1m", _mean("request_seconds", "1m")),
        Recording("trtqwen:time_to_first_token_seconds:mean_1m", _mean("time_to_first_token_seconds", "1m")),
        Recording("trtqwen:requests:rate_1m", f"sum(rate({_GATEWAY}_request_seconds_count[1m]))"),
        Recording("trtqwen:prompt_tokens:rate_1m", f"sum(rate({_GATEWAY}_prompt_tokens_total[1m]))"),
        Recording("trtqwen:output_tokens:rate_1m", f"sum(rate({_GATEWAY}_output_tokens_total[1m]))"),
        Recording(
            "trtqwen:prompt_cache_hits:ratio_5m",
            f"sum(rate({_GATEWAY}_cached_prompt_tokens_total[5m])) / sum(rate({_GATEWAY}_prompt_tokens_total[5m]))",
        ),
        Recording(
            "trtqwen:errors:ratio_5m",
            f'(sum({refused}{{status=~"5.."}}[5m])) or vector(0)) / ({ended} + {all_refused})',
        ),
        Recording(
            "trtqwen:refusals:ratio_5m",
            f'(sum({refused}{{status="429"}}[5m])) or vector(0)) / ({ended} + {all_refused})',
        ),
        Recording("trtqwen:in_flight:sum", f"sum({_GATEWAY}_in_flight)"),
        Recording("trtqwen:queued:sum", f"sum({_GATEWAY}_queued)"),
        Recording("trtqwen:queue_age_seconds:max", _QUEUE_AGE),
        Recording("trtqwen:replicas_up:sum", f"sum(max by (replica) ({_GATEWAY}_replica_up))"),
        Recording("trtqwen:queued_per_replica:ratio", "trtqwen:queued:sum / clamp_min(trtqwen:replicas_up:sum, 1)"),
        Recording("trtqwen:engine_active:sum", _engine("request", "request_type", "active")),
        Recording("trtqwen:engine_scheduled:sum", _engine("request", "request_type", "scheduled")),
        Recording("trtqwen:engine_waiting:sum", _engine("request", "request_type", "waiting")),
        Recording(
            "trtqwen:engine_batch_fill:ratio",
            f"trtqwen:engine_scheduled:sum / {_engine('request', 'request_type', 'max')}",
        ),
        Recording(
            "trtqwen:engine_steps:rate_1m",
            'sum by (instance) (rate(nv_trt_llm_general_metrics{general_type="iteration_counter"}[1m]))',
        ),
        Recording(
            "trtqwen:kv_cache_reserve:ratio",
            f"{_engine('kv_cache_block', 'kv_cache_block_type', 'free')} / "
            f"{_engine('kv_cache_block', 'kv_cache_block_type', 'max')}",
        ),
        Recording("trtqwen:gpu_utilization:ratio", _gpu("nv_gpu_utilization", "DCGM_FI_DEV_GPU_UTIL / 100")),
        Recording(
            "trtqwen:gpu_memory_reserve:ratio",
            _gpu(
                "(1 - nv_gpu_memory_used_bytes / nv_gpu_memory_total_bytes)",
                "(DCGM_FI_DEV_FB_FREE / (DCGM_FI_DEV_FB_FREE + DCGM_FI_DEV_FB_USED))",
            ),
        ),
        Recording("trtqwen:gpu_power:watts", _gpu("nv_gpu_power_usage", "DCGM_FI_DEV_POWER_USAGE")),
        Recording(
            "trtqwen:host_memory_reserve:ratio",
            "min by (instance) (1 - nv_cpu_memory_used_bytes / nv_cpu_memory_total_bytes)",
        ),
        Recording(
            "trtqwen:resident_memory:bytes",
            f'label_replace(sum by (instance) ({_GATEWAY}_resident_memory_bytes), "part", "gateway", "", "") or '
            f"label_replace({_engine('runtime_memory', 'memory_type', 'cpu')}, "
            '"part", "engine", "", "")',
        ),
        Recording("trtqwen:resident_memory:growth_per_hour", "deriv(trtqwen:resident_memory:bytes[30m]) * 3600"),
    ]
    return tuple(rules)


def alerts(thresholds: Thresholds) -> tuple[Alert, ...]:
    """All alert rules."""
    limit = thresholds
    return (
        Alert(
            "TrtqwenTargetDown",
            'up{job=~"trtqwen-.*"} == 0',
            "1m",
            "critical",
            "Prometheus cannot scrape {{ $labels.job }} at {{ $labels.instance }}.",
            "Check that the process runs and that its metrics port can be reached from Prometheus.",
        ),
        Alert(
            "TrtqwenEngineNotReady",
            f"{_GATEWAY}_ready == 0",
            "1m",
            "critical",
            "The gateway at {{ $labels.instance }} takes no requests: it is stopping or no replica answers.",
            "Read the log of trtqwen serve; trtqwen doctor --help says how to check a live server.",
        ),
        Alert(
            "TrtqwenModelDown",
            f"{_GATEWAY}_model_up == 0 and on (instance) {_GATEWAY}_ready == 1",
            "1m",
            "critical",
            "The gateway at {{ $labels.instance }} serves {{ $labels.model }}, but no engine of it answers.",
            "See `trtqwen models list` for its targets, and their Tritons' logs for the reason.",
        ),
        Alert(
            "TrtqwenReplicaDown",
            f"max by (replica) ({_GATEWAY}_replica_up) == 0",
            "1m",
            "warning",
            "The replica at {{ $labels.replica }} does not answer; the other replicas take its requests.",
            "Read that replica's log for the reason and restart it.",
        ),
        Alert(
            "TrtqwenEngineStalled",
            "trtqwen:engine_active:sum > 0 and trtqwen:engine_steps:rate_1m == 0",
            "1m",
            "critical",
            "The engine at {{ $labels.instance }} has {{ $value }} requests and computes no step.",
            "Look for a hung collective or a dead rank in Triton's log, then restart the replica.",
        ),
        Alert(
            "TrtqwenLatencyP99High",
            f"trtqwen:request_seconds:p99_5m > {limit.latency_p99_seconds:g}",
            "5m",
            "warning",
            "One request in a hundred takes more than {{ $value | humanizeDuration }}.",
            "Compare queue time with generation time on the dashboard; add replicas if requests wait.",
        ),
        Alert(
            "TrtqwenFirstTokenP99High",
            f"trtqwen:time_to_first_token_seconds:p99_5m > {limit.first_token_p99_seconds:g}",
            "5m",
            "warning",
            "One request in a hundred waits {{ $value | humanizeDuration }} for its first token.",
            "Add replicas if requests wait in the queue; otherwise enable chunked context or KV cache reuse.",
        ),
        Alert(
            "TrtqwenLatencyMeanHigh",
            f"trtqwen:request_seconds:mean_1m > {limit.latency_mean_seconds:g}",
            "1m",
            "warning",
            "A request takes {{ $value | humanizeDuration }} on average.",
            "Lower max_tokens or the load, or add replicas.",
        ),
        Alert(
            "TrtqwenGpuUtilizationHigh",
            f"trtqwen:gpu_utilization:ratio > {limit.gpu_utilization:g}",
            "1m",
            "warning",
            "GPU {{ $labels.gpu }} is {{ $value | humanizePercentage }} busy.",
            "Plan for more replicas; the autoscaler adds them where one runs.",
        ),
        Alert(
            "TrtqwenKvCacheReserveLow",
            f"trtqwen:kv_cache_reserve:ratio < {limit.memory_reserve:g}",
            "1m",
            "warning",
            "Only {{ $value | humanizePercentage }} of the KV cache blocks at {{ $labels.instance }} are free.",
            "Requests will wait for blocks: lower max_tokens, use an INT8 KV cache, or add replicas.",
        ),
        Alert(
            "TrtqwenGpuMemoryReserveLow",
            f"trtqwen:gpu_memory_reserve:ratio < {limit.memory_reserve:g} and on () "
            f"(min(trtqwen:kv_cache_reserve:ratio) < {limit.memory_reserve:g} or "
            "absent(trtqwen:kv_cache_reserve:ratio))",
            "1m",
            "warning",
            "Only {{ $value | humanizePercentage }} of GPU {{ $labels.gpu }}'s memory is free, and the KV cache has "
            "no reserve either.",
            "Lower kv_cache_free_gpu_mem_fraction or max_num_tokens, or move other processes off the GPU.",
        ),
        Alert(
            "TrtqwenHostMemoryReserveLow",
            f"trtqwen:host_memory_reserve:ratio < {limit.memory_reserve:g}",
            "1m",
            "warning",
            "Only {{ $value | humanizePercentage }} of the memory of {{ $labels.instance }}'s host is free.",
            "Find the process that grows; the kernel kills one when memory runs out.",
        ),
        Alert(
            "TrtqwenQueueAgeHigh",
            f"trtqwen:queue_age_seconds:max > {limit.queue_age_seconds:g}",
            "30s",
            "warning",
            "A request has waited {{ $value | humanizeDuration }} for its turn.",
            "Add replicas, or lower max_queued_requests so that clients are refused earlier.",
        ),
        Alert(
            "TrtqwenErrorRateHigh",
            f"trtqwen:errors:ratio_5m > {limit.error_ratio:g}",
            "1m",
            "critical",
            "{{ $value | humanizePercentage }} of requests end with a server error.",
            f"{_GATEWAY}_refused_total tells the errors apart by code; the log has the requests' ids.",
        ),
        Alert(
            "TrtqwenRefusalRateHigh",
            f"trtqwen:refusals:ratio_5m > {limit.refusal_ratio:g}",
            "5m",
            "warning",
            "{{ $value | humanizePercentage }} of requests are refused with status 429.",
            "Add replicas if the code is queue_full or queue_timeout; raise the key's rate otherwise.",
        ),
        Alert(
            "TrtqwenNanGuard",
            f"increase({_GATEWAY}_nan_guard_total[10m]) > 0",
            "0s",
            "critical",
            "The engine behind {{ $labels.instance }} sends only token 0, as a float16 overflow does.",
            "Serve in bfloat16, or with enable_context_fmha_fp32_acc.",
        ),
        Alert(
            "TrtqwenMemoryLeak",
            f"trtqwen:resident_memory:growth_per_hour > {limit.leak_bytes_per_hour:.0f}",
            "1h",
            "warning",
            "The {{ $labels.part }} at {{ $labels.instance }} grows by {{ $value | humanize1024 }}B per hour.",
            "Restart it when the load is low, and report the workload.",
        ),
    )


def recording_file() -> dict[str, Any]:
    """The content of the file of recording rules."""
    rules = [{"record": rule.name, "expr": rule.query} for rule in recordings()]
    return {"groups": [{"name": "trtqwen-recordings", "rules": rules}]}


def alert_file(thresholds: Thresholds) -> dict[str, Any]:
    """The content of the file of alert rules."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.query,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.hint,
                "runbook": f"{RUNBOOK}#{alert.name.lower()}",
            },
        }
        for alert in alerts(thresholds)
    ]
    return {"groups": [{"name": "trtqwen-alerts", "rules": rules}]}

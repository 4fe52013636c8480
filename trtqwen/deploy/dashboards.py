"""Grafana dashboards, made from a short list of panels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_GATEWAY = "trtqwen_gateway"
_WIDTH = 24  # columns of Grafana's grid
_HEIGHTS = {"stat": 4, "timeseries": 8}


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: Grafana's id of the unit.
        queries: each a query and its legend.
        width: columns of 24.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    kind: Literal["timeseries", "stat"] = "timeseries"
    description: str = ""


@dataclass(frozen=True)
class Dashboard:
    """Panels by row.

    Attributes:
        uid: stays the same across versions, so that links work.
    """

    uid: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    @property
    def queries(self) -> tuple[str, ...]:
        """Every query of every panel."""
        return tuple(query for _, panels in self.rows for panel in panels for query, _ in panel.queries)


def _percentiles(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"trtqwen:{name}:p{percent}_5m", f"P{percent}") for percent in (50, 95, 99))


def _request(kind: str) -> str:
    return f'nv_trt_llm_request_metrics{{request_type="{kind}",instance=~"$triton"}}'


def _blocks(kind: str) -> str:
    return f'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{kind}",instance=~"$triton"}}'


def _gateway(name: str) -> str:
    return f'{_GATEWAY}_{name}{{instance=~"$gateway"}}'


SERVICE = Dashboard(
    "trtqwen-service",
    "trtqwen: service",
    (
        (
            "Now",
            (
                Panel("Replicas up", "short", (("trtqwen:replicas_up:sum", ""),), 4, "stat"),
                Panel("Requests per second", "reqps", (("trtqwen:requests:rate_1m", ""),), 4, "stat"),
                Panel("Output tokens per second", "short", (("trtqwen:output_tokens:rate_1m", ""),), 4, "stat"),
                Panel("P99 latency", "s", (("trtqwen:request_seconds:p99_5m", ""),), 4, "stat"),
                Panel("Waiting", "short", (("trtqwen:queued:sum", ""),), 4, "stat"),
                Panel("Server errors", "percentunit", (("trtqwen:errors:ratio_5m", ""),), 4, "stat"),
            ),
        ),
        (
            "Latency",
            (
                Panel("Request latency", "s", _percentiles("request_seconds"), 6),
                Panel("Time to first token", "s", _percentiles("time_to_first_token_seconds"), 6),
                Panel("Inter-token latency", "s", _percentiles("inter_token_seconds"), 6),
                Panel("Time in the queue", "s", _percentiles("queue_seconds"), 6),
            ),
        ),
        (
            "Load",
            (
                Panel(
                    "Tokens per second",
                    "short",
                    (("trtqwen:prompt_tokens:rate_1m", "prompt"), ("trtqwen:output_tokens:rate_1m", "output")),
                ),
                Panel(
                    "Requests",
                    "short",
                    ((f"sum({_gateway('in_flight')})", "in flight"), (f"sum({_gateway('queued')})", "waiting")),
                ),
                Panel("Oldest waiting request", "s", (("trtqwen:queue_age_seconds:max", "age"),)),
                Panel(
                    "Answers by end",
                    "reqps",
                    ((f"sum by (reason) (rate({_gateway('finished_total')}[1m]))", "{{reason}}"),),
                ),
                Panel(
                    "Refusals and errors",
                    "reqps",
                    ((f"sum by (status, code) (rate({_gateway('refused_total')}[1m]))", "{{status}} {{code}}"),),
                ),
                Panel(
                    "Prompt tokens found in the KV cache",
                    "percentunit",
                    (("trtqwen:prompt_cache_hits:ratio_5m", ""),),
                ),
            ),
        ),
        (
            "Replicas",
            (
                Panel("Replica up", "short", ((f"max by (replica) ({_gateway('replica_up')})", "{{replica}}"),), 6),
                Panel(
                    "In flight per replica",
                    "short",
                    ((f"sum by (replica) ({_gateway('replica_in_flight')})", "{{replica}}"),),
                    6,
                ),
                Panel(
                    "Reserved tokens per replica",
                    "short",
                    ((f"sum by (replica) ({_gateway('replica_in_flight_tokens')})", "{{replica}}"),),
                    6,
                ),
                Panel(
                    "Sequences sent to each replica",
                    "reqps",
                    ((f"sum by (replica) (rate({_gateway('replica_sequences_total')}[1m]))", "{{replica}}"),),
                    6,
                ),
            ),
        ),
        (
            "Models",
            (
                Panel("Model up", "short", ((f"max by (model) ({_gateway('model_up')})", "{{model}}"),), 6),
                Panel(
                    "Requests by target",
                    "reqps",
                    (
                        (
                            f"sum by (model, target, role) (rate({_gateway('target_requests_total')}[1m]))",
                            "{{model}} {{target}} {{role}}",
                        ),
                    ),
                    6,
                ),
                Panel(
                    "P95 time to first token by target",
                    "s",
                    (
                        (
                            "histogram_quantile(0.95, sum by (model, target, role, le) "
                            f"(rate({_gateway('target_time_to_first_token_seconds_bucket')}[5m])))",
                            "{{model}} {{target}} {{role}}",
                        ),
                    ),
                    6,
                ),
                Panel(
                    "Copies by result",
                    "reqps",
                    (
                        (
                            f"sum by (target, result) (rate({_gateway('shadow_answers_total')}[5m])) or vector(0)",
                            "{{target}} {{result}}",
                        ),
                    ),
                    6,
                    description="What became of the requests that were copied to shadows.",
                ),
            ),
        ),
        (
            "Gateway",
            (
                Panel("Memory", "bytes", (('trtqwen:resident_memory:bytes{part="gateway"}', "{{instance}}"),)),
                Panel(
                    "CPU",
                    "percentunit",
                    ((f"rate({_gateway('cpu_seconds_total')}[1m])", "{{instance}}"),),
                ),
                Panel(
                    "Probes", "reqps", ((f"sum by (result) (rate({_gateway('probes_total')}[1m]))", "{{result}}"),)
                ),
            ),
        ),
    ),
)

ENGINES = Dashboard(
    "trtqwen-engines",
    "trtqwen: engines and GPUs",
    (
        (
            "GPU",
            (
                Panel("GPU utilization", "percentunit", (("trtqwen:gpu_utilization:ratio", "{{gpu}}"),)),
                Panel("Free GPU memory", "percentunit", (("trtqwen:gpu_memory_reserve:ratio", "{{gpu}}"),)),
                Panel("GPU power", "watt", (("trtqwen:gpu_power:watts", "{{gpu}}"),)),
            ),
        ),
        (
            "KV cache",
            (
                Panel(
                    "KV cache blocks",
                    "short",
                    ((_blocks("used"), "{{instance}} used"), (_blocks("max"), "{{instance}} all")),
                ),
                Panel("Free KV cache blocks", "percentunit", (("trtqwen:kv_cache_reserve:ratio", "{{instance}}"),)),
                Panel("Reused KV cache blocks", "short", ((_blocks("reused"), "{{instance}}"),)),
            ),
        ),
        (
            "Batch",
            (
                Panel(
                    "Requests in the engine",
                    "short",
                    (
                        (_request("scheduled"), "{{instance}} scheduled"),
                        (_request("waiting"), "{{instance}} waiting"),
                    ),
                ),
                Panel("Batch fill", "percentunit", (("trtqwen:engine_batch_fill:ratio", "{{instance}}"),)),
                Panel("Steps per second", "short", (("trtqwen:engine_steps:rate_1m", "{{instance}}"),)),
                Panel(
                    "Context tokens in a step",
                    "short",
                    (
                        (
                            "nv_trt_llm_inflight_batcher_metrics"
                            '{inflight_batcher_specific_metric="total_context_tokens",instance=~"$triton"}',
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "Paused requests",
                    "short",
                    (
                        (
                            "nv_trt_llm_inflight_batcher_metrics"
                            '{inflight_batcher_specific_metric="paused_requests",instance=~"$triton"}',
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "Triton requests",
                    "reqps",
                    (
                        (
                            'sum by (instance) (rate(nv_inference_request_success{model="tensorrt_llm",'
                            'instance=~"$triton"}[1m]))',
                            "{{instance}} done",
                        ),
                        (
                            'sum by (instance, reason) (rate(nv_inference_request_failure{model="tensorrt_llm",'
                            'instance=~"$triton"}[1m]))',
                            "{{instance}} {{reason}}",
                        ),
                    ),
                ),
            ),
        ),
        (
            "Host",
            (
                Panel("Free host memory", "percentunit", (("trtqwen:host_memory_reserve:ratio", "{{instance}}"),)),
                Panel(
                    "Host CPU",
                    "percentunit",
                    (('max by (instance) (nv_cpu_utilization{instance=~"$triton"})', "{{instance}}"),),
                ),
                Panel("Engine memory", "bytes", (('trtqwen:resident_memory:bytes{part="engine"}', "{{instance}}"),)),
            ),
        ),
    ),
)

DASHBOARDS = (SERVICE, ENGINES)
_VARIABLES = {
    "gateway": f"label_values({_GATEWAY}_ready, instance)",
    "triton": "label_values(nv_inference_count, instance)",
}


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana imports and provisions it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in dashboard.rows:
        place = {"h": 1, "w": _WIDTH, "x": 0, "y": top}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        top += 1
        left = height = 0
        for panel in row:
            if left + panel.width > _WIDTH:
                left, top, height = 0, top + height, 0
            height = max(height, _HEIGHTS[panel.kind])
            place = {"h": _HEIGHTS[panel.kind], "w": panel.width, "x": left, "y": top}
            panels.append({"id": len(panels) + 1, **_panel(panel), "gridPos": place})
            left += panel.width
        top += height
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["trtqwen"],
        "editable": True,
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_DATASOURCE, *(_variable(name, query) for name, query in _VARIABLES.items())]},
        "annotations": {"list": [_alert_annotations()]},
        "panels": panels,
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DATASOURCE = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "datasource": _SOURCE, "expr": query, "legendFormat": legend or panel.title}
        for number, (query, legend) in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.unit == "percentunit" and panel.kind == "timeseries":
        defaults |= {"min": 0, "max": 1}
    elif panel.kind == "timeseries":
        defaults |= {"min": 0}
    if panel.kind == "stat":
        options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    else:
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _alert_annotations() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Trtqwen.*",alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{severity}}",
    }

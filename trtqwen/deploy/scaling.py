"""Autoscaling: on requests that wait, on GPUs that are busy for a minute, and on the mean latency."""

from __future__ import annotations

from typing import Any

from trtqwen.deploy.objects import Kubernetes, Names, Object


def signals(name: str, namespace: str) -> dict[str, str]:
    """Return the autoscalers' queries by signal. Each returns exactly one number, also without traffic."""
    pods = f'namespace="{namespace}",pod=~"{name}-.*"'
    latency = "trtqwen_gateway_request_seconds"
    mean = f"sum(rate({latency}_sum{{{pods}}}[1m])) / sum(rate({latency}_count{{{pods}}}[1m]))"
    return {
        "queue": f"sum(trtqwen_gateway_queued{{{pods}}}) or vector(0)",
        "gpu": f"min_over_time((100 * avg(nv_gpu_utilization{{{pods}}}))[1m:5s]) or vector(0)",
        "latency": f"({mean}) > 0 or vector(0)",
    }


_BEHAVIOR = {
    "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]},
    # A pod that ends gives up its KV cache and takes minutes to come back.
    "scaleDown": {
        "stabilizationWindowSeconds": 600,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}],
    },
}


def keda(names: Names, plan: Kubernetes) -> list[Object]:
    """A `ScaledObject` that asks Prometheus."""
    queries = signals(names.name, names.namespace)

    def trigger(name: str, threshold: Any, metric_type: str) -> Object:
        metadata = {"serverAddress": names["prometheus"], "query": queries[name], "threshold": threshold}
        return {"type": "prometheus", "name": name, "metricType": metric_type, "metadata": metadata}

    spec = {
        "scaleTargetRef": names.workload if names.several_nodes else {"name": names.name},
        "minReplicaCount": names["replicas"],
        "maxReplicaCount": names["maxReplicas"],
        "pollingInterval": 10,
        "cooldownPeriod": 600,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _BEHAVIOR}},
        "triggers": [
            trigger("queue", _text(names["queueDepth"]), "AverageValue"),
            trigger("gpu", _text(names["gpuUtilizationPercent"]), "Value"),
            trigger("latency", _text(names["meanLatencySeconds"]), "Value"),
        ],
    }
    return [names.object("ScaledObject", "keda.sh/v1alpha1", spec)]


def _text(value: Any) -> str:
    """KEDA's thresholds are strings."""
    return f"{value[:-3]}| quote }}}}" if isinstance(value, str) else str(value)


_ADAPTER_NAMES = {"queue": "trtqwen_queue", "gpu": "trtqwen_gpu_percent", "latency": "trtqwen_mean_latency_seconds"}


def hpa(names: Names, plan: Kubernetes) -> list[Object]:
    """A `HorizontalPodAutoscaler` on the metrics of prometheus-adapter."""

    def metric(signal: str, target: Object) -> Object:
        selector = {"matchLabels": {"service": names.name}}
        identity = {"name": _ADAPTER_NAMES[signal], "selector": selector}
        return {"type": "External", "external": {"metric": identity, "target": target}}

    spec = {
        "scaleTargetRef": names.workload,
        "minReplicas": names["replicas"],
        "maxReplicas": names["maxReplicas"],
        "behavior": _BEHAVIOR,
        "metrics": [
            metric("queue", {"type": "AverageValue", "averageValue": _text(names["queueDepth"])}),
            metric("gpu", {"type": "Value", "value": _text(names["gpuUtilizationPercent"])}),
            metric("latency", {"type": "Value", "value": _text(names["meanLatencySeconds"])}),
        ],
    }
    return [names.object("HorizontalPodAutoscaler", "autoscaling/v2", spec)]


def adapter_values() -> Object:
    """Values of prometheus-adapter's Helm chart: the signals of all services of trtqwen, by namespace and service."""
    latency, by = "trtqwen_gateway_request_seconds", "sum by (namespace, service)"
    pods = 'service!="",namespace!=""'
    queries = {
        "queue": f"{by} (trtqwen_gateway_queued{{{pods}}})",
        "gpu": f"min_over_time((100 * avg by (namespace, service) (nv_gpu_utilization{{{pods}}}))[1m:5s])",
        "latency": f"({by} (rate({latency}_sum{{{pods}}}[1m])) / {by} (rate({latency}_count{{{pods}}}[1m]))) > 0 "
        f"or {by} (trtqwen_gateway_queued{{{pods}}} * 0)",
    }
    series = {"queue": "trtqwen_gateway_queued", "gpu": "nv_gpu_utilization", "latency": f"{latency}_count"}
    rules = [
        {
            "seriesQuery": f"{series[signal]}{{{pods}}}",
            "resources": {"overrides": {"namespace": {"resource": "namespace"}}},
            "name": {"as": _ADAPTER_NAMES[signal]},
            "metricsQuery": query,
        }
        for signal, query in queries.items()
    ]
    return {"rules": {"default": False, "external": rules}}

"""The directory that `trtqwen deploy kubernetes` writes: kustomize files and a Helm chart, from the same objects."""

from __future__ import annotations

from typing import Any

from trtqwen.deploy import nodes
from trtqwen.deploy.chart import chart_files
from trtqwen.deploy.files import Files, to_yaml
from trtqwen.deploy.objects import GATEWAY_PORT, Kubernetes, MakeObjects, Names, Object, base_objects, values_of
from trtqwen.deploy.rules import Thresholds, alert_file, recording_file
from trtqwen.deploy.scaling import adapter_values, hpa, keda


def kubernetes_files(plan: Kubernetes) -> Files:
    """The files by their paths below the output directory."""
    dockerfile = plan.image.dockerfile + (nodes.KUBECTL if plan.nodes > 1 else "")
    return {"Dockerfile": dockerfile, **_kustomize(plan), **chart_files(plan, _COMPONENTS)}


def _kustomize(plan: Kubernetes) -> dict[str, str]:
    names = Names(values_of(plan), name="trtqwen", namespace=plan.namespace, several_nodes=plan.nodes > 1)
    top = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    component = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    files = {
        "kustomize/base/kustomization.yaml": to_yaml({**top, "resources": ["trtqwen.yaml"]}),
        "kustomize/base/trtqwen.yaml": to_yaml(*map(_prune, base_objects(names, plan))),
        "kustomize/kustomization.yaml": to_yaml(
            {**top, "namespace": plan.namespace, "resources": ["base"]},
            heading="Written by `trtqwen deploy kubernetes`. Apply it with `kubectl apply -k kustomize`.\n"
            f"Components to add: {', '.join(f'components/{name}' for name in _COMPONENTS)}.",
        ),
    }
    for name, make in _COMPONENTS.items():
        directory = f"kustomize/components/{name}"
        files[f"{directory}/kustomization.yaml"] = to_yaml({**component, "resources": [f"{name}.yaml"]})
        files[f"{directory}/{name}.yaml"] = to_yaml(*map(_prune, make(names, plan)))
    files["prometheus-adapter-values.yaml"] = to_yaml(
        adapter_values(), heading="Values of the Helm chart prometheus-community/prometheus-adapter."
    )
    return files


def _prune(item: Any) -> Any:
    """An object without the empty mappings and lists that a person may fill in."""
    if isinstance(item, dict):
        kept = {key: _prune(value) for key, value in item.items()}
        return {key: value for key, value in kept.items() if value not in ([], {}) or key == "emptyDir"}
    return [_prune(value) for value in item] if isinstance(item, list) else item


# Components: Prometheus operator, and the Gateway API inference extension, next to the autoscalers.


def _operator(names: Names, plan: Kubernetes) -> list[Object]:
    def endpoint(port: str, job: str) -> Object:
        relabel = [
            {"targetLabel": "job", "replacement": job},
            {"targetLabel": "service", "replacement": names.name},
        ]
        return {"port": port, "interval": "5s", "relabelings": relabel}

    monitor = {
        "selector": {"matchLabels": names.serving},
        "podMetricsEndpoints": [endpoint("http", "trtqwen-gateway"), endpoint("metrics", "trtqwen-triton")],
    }
    groups = recording_file()["groups"] + alert_file(Thresholds())["groups"]
    return [
        names.object("PodMonitor", "monitoring.coreos.com/v1", monitor),
        names.object("PrometheusRule", "monitoring.coreos.com/v1", {"groups": groups}),
    ]


def _picker(names: Names, plan: Kubernetes) -> list[Object]:
    """Return the endpoint picker's object. Gateways publish its figures under its default names, `vllm:*`."""
    pool = {
        "selector": {"matchLabels": names.serving},
        "targetPorts": [{"number": GATEWAY_PORT}],
        "endpointPickerRef": {"name": names.name + "-epp", "port": {"number": 9002}},
    }
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
        "backendRefs": [{"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": names.name}],
    }
    route = {"parentRefs": [{"name": "inference-gateway"}], "rules": [rule]}
    return [
        names.object("InferencePool", "inference.networking.k8s.io/v1", pool),
        names.object("HTTPRoute", "gateway.networking.k8s.io/v1", route),
    ]


_COMPONENTS: dict[str, MakeObjects] = {
    "keda": keda,
    "prometheus-adapter": hpa,
    "prometheus-operator": _operator,
    "inference-extension": _picker,
}

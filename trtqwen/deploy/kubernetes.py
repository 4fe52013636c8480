"""The directory that `trtqwen deploy kubernetes` writes: kustomize files and a Helm chart, from the same objects.

A pod is one replica: `trtqwen serve` runs Triton and the gateway in it. An init container writes the model repository
of the engine on the model volume, because a repository names its engine by an absolute path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from trtqwen import __version__
from trtqwen.deploy import nodes
from trtqwen.deploy.files import Files, to_yaml
from trtqwen.deploy.image import ServingImage, gpus_of
from trtqwen.deploy.rules import Thresholds, alert_file, recording_file
from trtqwen.facts.cards import card_facts
from trtqwen.recipe import Recipe

DRAIN_SECONDS = 60
GATEWAY_PORT, METRICS_PORT = 8080, 8002
MODELS, REPOSITORY, SETTINGS, KEYS = "/models", "/repository", "/etc/trtqwen", "/etc/trtqwen-keys"
_LEAVE_SECONDS = 10  # for load balancers to learn that a pod leaves
_EXIT_SECONDS = 30  # from the end of the last request to the end of the process
_USER = 1000
Object = dict[str, Any]
Component = Literal["base", "keda", "prometheus-adapter", "prometheus-operator", "inference-extension"]


@dataclass(frozen=True)
class Kubernetes:
    """What is deployed.

    Attributes:
        claim: name of the PersistentVolumeClaim that holds the engine; None if `model_image` holds it.
        model_image: an OCI image that holds the engine, mounted as a volume (Kubernetes 1.33 and newer).
        engine: the engine's directory below the root of the volume.
        max_replicas: at most so many pods when an autoscaler runs.
        throttle_seconds: mean latency beyond which requests that would have to wait are refused.
        queue_depth: waiting requests for each pod above which pods are added.
        prometheus: address of the Prometheus that KEDA asks.
        nodes: of one replica; more than one needs the LeaderWorkerSet controller.
    """

    recipe: Recipe
    image: ServingImage
    claim: str | None = "trtqwen-models"
    model_image: str | None = None
    engine: str | None = None
    max_replicas: int = 8
    queue_depth: int = 8
    throttle_seconds: float = 3
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    namespace: str = "trtqwen"
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.nodes > 1:
            nodes.check_nodes(self.recipe, self.nodes)

    @property
    def engine_directory(self) -> str:
        return f"{MODELS}/{self.engine or f'engines/{self.recipe.name}/engine'}"


def kubernetes_files(plan: Kubernetes) -> Files:
    """The files by their paths below the output directory."""
    dockerfile = plan.image.dockerfile + (nodes.KUBECTL if plan.nodes > 1 else "")
    return {"Dockerfile": dockerfile, **_kustomize(plan), **_chart(plan)}


# Values: what a person sets. Kustomize gets them as they are, the chart as references to values.yaml.


def _values(plan: Kubernetes) -> dict[str, Any]:
    recipe = plan.recipe
    gpus = gpus_of(recipe) // plan.nodes
    volume = (
        {"image": {"reference": plan.model_image, "pullPolicy": "IfNotPresent"}}
        if plan.model_image
        else {"persistentVolumeClaim": {"claimName": plan.claim, "readOnly": True}}
    )
    limits = {"nvidia.com/gpu": gpus} if gpus else {}
    one_gpu_memory = 32 * max(1, gpus)  # GiB: Triton, its python models, and pinned memory for each GPU
    return {
        "replicas": recipe.serve.replicas,
        "maxReplicas": max(plan.max_replicas, recipe.serve.replicas),
        "image": plan.image.name,
        "imagePullPolicy": "IfNotPresent",
        "imagePullSecrets": [],
        "engine": plan.engine_directory,
        "modelVolume": volume,
        "keysSecret": "trtqwen-keys",
        "resources": {
            "requests": {"cpu": "4", "memory": f"{one_gpu_memory}Gi"} if gpus else {"cpu": "1", "memory": "4Gi"},
            "limits": {**limits, "memory": f"{one_gpu_memory}Gi" if gpus else "4Gi"},
        },
        "sharedMemory": f"{max(1, gpus) * 2}Gi",
        "nodeSelector": {},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if gpus else [],
        "queueDepth": plan.queue_depth,
        "gpuUtilizationPercent": 80,
        "meanLatencySeconds": 3,
        "prometheus": plan.prometheus,
    }


class _Names:
    """Names of objects, and values, for kustomize or for Helm."""

    def __init__(self, values: Mapping[str, Any], *, name: str, namespace: str, several_nodes: bool = False) -> None:
        self.values = values
        self.several_nodes = several_nodes
        self.name = name
        self.namespace = namespace

    def __getitem__(self, value: str) -> Any:
        return self.values[value]

    @property
    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "trtqwen", "app.kubernetes.io/instance": self.name}

    @property
    def serving(self) -> dict[str, str]:
        """The labels of the pods that clients reach."""
        return {**self.labels, **(nodes.LEADER if self.several_nodes else {})}

    @property
    def workload(self) -> dict[str, str]:
        """What autoscalers scale."""
        kind = (nodes.API, "LeaderWorkerSet") if self.several_nodes else ("apps/v1", "Deployment")
        return {"apiVersion": kind[0], "kind": kind[1], "name": self.name}

    def object(
        self, kind: str, version: str, spec: Mapping[str, Any], *, suffix: str = "", **metadata: Any
    ) -> Object:
        head = {"name": self.name + suffix, "labels": self.labels, **metadata}
        return {"apiVersion": version, "kind": kind, "metadata": head, "spec": dict(spec)}


def _base(names: _Names, plan: Kubernetes) -> list[Object]:
    serve = plan.recipe.model_dump(exclude={"name"}, exclude_defaults=True)
    serve["serve"] = {**serve.get("serve", {}), "replicas": 1}  # the pods are the replicas
    if "host" in serve:
        serve["host"] = {**serve["host"], "gpus": plan.recipe.world_size}
    files = {
        f"{plan.recipe.name}.yaml": to_yaml(serve),
        "gateway.yaml": to_yaml({"drain_seconds": DRAIN_SECONDS, "throttle_seconds": plan.throttle_seconds}),
    }
    if plan.nodes > 1:
        files[nodes.SHELL] = nodes.SHELL_TEXT
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": names.name, "labels": names.labels},
        "data": files,
    }
    service = {
        "selector": names.serving,
        "ports": [
            {"name": "http", "port": 80, "targetPort": "http"},
            {"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics"},
        ],
    }
    ingress: list[Object] = [{"ports": [{"port": "http"}, {"port": "metrics"}]}]
    if plan.nodes > 1:  # ranks talk to each other on ports of their own
        ingress.append({"from": [{"podSelector": {"matchLabels": names.labels}}]})
    return [
        config,
        *_workload(names, plan),
        names.object("Service", "v1", service),
        # Triton's own HTTP and gRPC ports have no keys and no limits: nothing outside the pod reaches them.
        names.object(
            "NetworkPolicy",
            "networking.k8s.io/v1",
            {
                "podSelector": {"matchLabels": names.labels},
                "policyTypes": ["Ingress"],
                "ingress": ingress,
            },
        ),
        names.object(
            "PodDisruptionBudget",
            "policy/v1",
            {"maxUnavailable": 1, "selector": {"matchLabels": names.labels}},
        ),
    ]


def _workload(names: _Names, plan: Kubernetes) -> list[Object]:
    if plan.nodes == 1:
        return [names.object("Deployment", "apps/v1", _deployment(names, plan))]
    ranks = nodes.check_nodes(plan.recipe, plan.nodes)
    drain = _LEAVE_SECONDS + DRAIN_SECONDS
    spec = nodes.group(names["replicas"], names.labels, _pod(names, plan), plan.nodes, ranks, names.name, drain)
    return [names.object("LeaderWorkerSet", nodes.API, spec), *nodes.role(names.name, names.namespace, names.labels)]


def _deployment(names: _Names, plan: Kubernetes) -> Object:
    return {
        "replicas": names["replicas"],
        "selector": {"matchLabels": names.labels},
        # A GPU is free for a new pod only when an old one has ended.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "template": {"metadata": {"labels": names.labels}, "spec": _pod(names, plan)},
    }


def _pod(names: _Names, plan: Kubernetes) -> Object:
    recipe = plan.recipe
    repository = f"{REPOSITORY}/{recipe.name}"
    environment = {"HOME": "/tmp", "USER": "trtqwen"}
    if recipe.world_size > 1 and recipe.host is not None and not card_facts(recipe.host.card).peer_to_peer:
        environment["NCCL_P2P_DISABLE"] = "1"
    common = {
        "image": names["image"],
        "imagePullPolicy": names["imagePullPolicy"],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    mounts = [
        {"name": "models", "mountPath": MODELS, "readOnly": True},
        {"name": "repository", "mountPath": REPOSITORY},
        {"name": "settings", "mountPath": SETTINGS, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    write = {
        "name": "repository",
        **common,
        "args": [
            "repo",
            names["engine"],
            f"--recipe={SETTINGS}/{recipe.name}.yaml",
            f"--output={repository}",
            "--force",  # a container that restarts finds the repository of its predecessor
        ],
        "volumeMounts": mounts,
    }
    serve = {
        "name": "trtqwen",
        **common,
        "args": [
            "serve",
            f"--repo={repository}",
            "--host=0.0.0.0",
            "--triton-host=0.0.0.0",
            f"--gateway-port={GATEWAY_PORT}",
            f"--metrics-port={METRICS_PORT}",
            f"--api-keys={KEYS}/keys.yaml",
            f"--gateway-config={SETTINGS}/gateway.yaml",
            f"--model-name={recipe.name}",
        ],
        "ports": [
            {"name": "http", "containerPort": GATEWAY_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "resources": names["resources"],
        # An engine of tens of gigabytes comes from a slow volume: half an hour until the first answer.
        "startupProbe": {**_probe("/ready"), "periodSeconds": 5, "failureThreshold": 360},
        "readinessProbe": {**_probe("/ready"), "periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {**_probe("/health"), "periodSeconds": 10, "failureThreshold": 6},
        # New requests still arrive until all load balancers know that the pod leaves: drain only then.
        "lifecycle": {"preStop": {"sleep": {"seconds": _LEAVE_SECONDS}}},
        "volumeMounts": [
            *mounts,
            {"name": "keys", "mountPath": KEYS, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "automountServiceAccountToken": False,
        "imagePullSecrets": names["imagePullSecrets"],
        "nodeSelector": names["nodeSelector"],
        "tolerations": names["tolerations"],
        "terminationGracePeriodSeconds": _LEAVE_SECONDS + DRAIN_SECONDS + _EXIT_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [write],
        "containers": [serve],
        "volumes": [
            {"name": "models", **_volume(names)},
            {"name": "repository", "emptyDir": {}},
            {"name": "settings", "configMap": {"name": names.name}},
            {"name": "keys", "secret": {"secretName": names["keysSecret"]}},
            {"name": "tmp", "emptyDir": {}},
            # Ranks and Triton's python models exchange data here; the default of 64 MiB is too small.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": names["sharedMemory"]}},
        ],
    }


def _probe(path: str) -> Object:
    return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 5}


def _volume(names: _Names) -> Object:
    volume = names["modelVolume"]
    return volume if isinstance(volume, dict) else {_MERGE: volume}


# Autoscaling: on requests that wait, on GPUs that are busy for a minute, and on the mean latency.


def signals(name: str, namespace: str) -> dict[str, str]:
    """The queries that autoscalers ask, by what they tell; each returns exactly one number, also without traffic."""
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


def _keda(names: _Names, plan: Kubernetes) -> list[Object]:
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


def _hpa(names: _Names, plan: Kubernetes) -> list[Object]:
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


# Prometheus operator, and the Gateway API inference extension.


def _operator(names: _Names, plan: Kubernetes) -> list[Object]:
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


def _picker(names: _Names, plan: Kubernetes) -> list[Object]:
    """The gateways publish the figures that the endpoint picker reads under its default names, `vllm:*`."""
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


_COMPONENTS = {
    "keda": _keda,
    "prometheus-adapter": _hpa,
    "prometheus-operator": _operator,
    "inference-extension": _picker,
}


def _kustomize(plan: Kubernetes) -> dict[str, str]:
    names = _Names(_values(plan), name="trtqwen", namespace=plan.namespace, several_nodes=plan.nodes > 1)
    top = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    component = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    files = {
        "kustomize/base/kustomization.yaml": to_yaml({**top, "resources": ["trtqwen.yaml"]}),
        "kustomize/base/trtqwen.yaml": to_yaml(*map(_prune, _base(names, plan))),
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


# The chart: the same objects, with references in place of values.

_MERGE = "<<values>>"
_REFERENCE = re.compile(r"'(\{\{ [^']* \}\})'")
_MERGED = re.compile(r"^( *)(- )?" + re.escape(_MERGE) + r": (\{\{ .* \}\})$", re.MULTILINE)
_JSON = {"imagePullSecrets", "modelVolume", "resources", "nodeSelector", "tolerations"}
_SWITCHES = {
    "keda": 'eq .Values.autoscaler "keda"',
    "prometheus-adapter": 'eq .Values.autoscaler "prometheus-adapter"',
    "prometheus-operator": ".Values.prometheusOperator",
    "inference-extension": ".Values.inferenceExtension",
}


def _chart(plan: Kubernetes) -> dict[str, str]:
    values = _values(plan)
    references = {
        name: f"{{{{ toJson .Values.{name} }}}}" if name in _JSON else f"{{{{ .Values.{name} }}}}" for name in values
    }
    names = _Names(
        references,
        name="{{ .Release.Name }}",
        namespace="{{ .Release.Namespace }}",
        several_nodes=plan.nodes > 1,
    )
    chart = {
        "apiVersion": "v2",
        "name": "trtqwen",
        "description": f"trtqwen serving the recipe {plan.recipe.name}",
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
        "kubeVersion": ">=1.30.0-0",
    }
    switches = {"autoscaler": "none", "prometheusOperator": False, "inferenceExtension": False}
    heading = "autoscaler is none, keda or prometheus-adapter."
    files = {
        "helm/trtqwen/Chart.yaml": to_yaml(chart),
        "helm/trtqwen/values.yaml": to_yaml({**values, **switches}, heading=heading),
        "helm/trtqwen/templates/trtqwen.yaml": _template(_base(names, plan)),
    }
    for name, make in _COMPONENTS.items():
        text = _template(make(names, plan))
        files[f"helm/trtqwen/templates/{name}.yaml"] = f"{{{{- if {_SWITCHES[name]} }}}}\n{text}{{{{- end }}}}\n"
    return files


def _template(objects: list[Object]) -> str:
    """Objects as Helm's template: references bare, and what Prometheus expands kept from Helm."""
    text = "---\n".join(
        yaml.safe_dump(_escape(item), sort_keys=False, allow_unicode=True, width=100_000) for item in objects
    )
    return _MERGED.sub(_include, _REFERENCE.sub(r"\1", text))


def _include(match: re.Match[str]) -> str:
    """A reference to a mapping whose fields belong next to others."""
    space, dash, reference = match[1], match[2] or "", match[3]
    value = reference[2:-2].strip().removeprefix("toJson ")
    return f"{space}{dash}{{{{- toYaml {value} | nindent {len(space) + len(dash)} }}}}"


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str) and re.search(r"\{\{ \$", value):
        return re.sub(r"\{\{ (\$.*?) \}\}", r"{{ `{{ \1 }}` }}", value)
    return value


def _prune(item: Any) -> Any:
    """An object without the empty mappings and lists that a person may fill in."""
    if isinstance(item, dict):
        kept = {key: _prune(value) for key, value in item.items()}
        return {key: value for key, value in kept.items() if value not in ([], {}) or key == "emptyDir"}
    return [_prune(value) for value in item] if isinstance(item, list) else item

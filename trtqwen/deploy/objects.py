"""The Kubernetes objects of a deployment, with values for kustomize or references for Helm.

A pod is one replica: `trtqwen serve` runs Triton and the gateway in it. An init container writes the model repository
of the engine on the model volume, because a repository names its engine by an absolute path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtqwen.deploy import nodes
from trtqwen.deploy.files import to_yaml
from trtqwen.deploy.image import ServingImage, gpus_of
from trtqwen.facts.cards import card_facts
from trtqwen.recipe import Recipe

DRAIN_SECONDS = 60
GATEWAY_PORT, METRICS_PORT = 8080, 8002
MODELS, REPOSITORY, SETTINGS, KEYS = "/models", "/repository", "/etc/trtqwen", "/etc/trtqwen-keys"
_LEAVE_SECONDS = 10  # for load balancers to learn that a pod leaves
_EXIT_SECONDS = 30  # from the end of the last request to the end of the process
_USER = 1000
Object = dict[str, Any]
MERGE = "<<values>>"  # key whose value is a reference to a mapping: its fields belong next to others


@dataclass(frozen=True)
class Kubernetes:
    """What is deployed.

    Attributes:
        claim: name of the PersistentVolumeClaim that holds the engine; None if `model_image` holds it.
        model_image: an OCI image that holds the engine, mounted as a volume (Kubernetes 1.33 and newer).
        engine: the engine's directory below the root of the volume.
        max_replicas: largest number of pods with an autoscaler.
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


def values_of(plan: Kubernetes) -> dict[str, Any]:
    """Return the values that a user sets. Kustomize gets the values, the chart references to values.yaml."""
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


class Names:
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


MakeObjects = Callable[[Names, Kubernetes], list[Object]]  # what a component adds


def base_objects(names: Names, plan: Kubernetes) -> list[Object]:
    """What every deployment has."""
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


def _workload(names: Names, plan: Kubernetes) -> list[Object]:
    if plan.nodes == 1:
        return [names.object("Deployment", "apps/v1", _deployment(names, plan))]
    ranks = nodes.check_nodes(plan.recipe, plan.nodes)
    drain = _LEAVE_SECONDS + DRAIN_SECONDS
    spec = nodes.group(names["replicas"], names.labels, _pod(names, plan), plan.nodes, ranks, names.name, drain)
    return [names.object("LeaderWorkerSet", nodes.API, spec), *nodes.role(names.name, names.namespace, names.labels)]


def _deployment(names: Names, plan: Kubernetes) -> Object:
    return {
        "replicas": names["replicas"],
        "selector": {"matchLabels": names.labels},
        # A GPU is free for a new pod only when an old one has ended.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "template": {"metadata": {"labels": names.labels}, "spec": _pod(names, plan)},
    }


def _pod(names: Names, plan: Kubernetes) -> Object:
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


def _volume(names: Names) -> Object:
    volume = names["modelVolume"]
    return volume if isinstance(volume, dict) else {MERGE: volume}

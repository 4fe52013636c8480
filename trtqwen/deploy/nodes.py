"""One replica on several nodes: a LeaderWorkerSet whose leader starts ranks in the pods of its group.

The leader runs `trtqwen serve`. Open MPI starts the ranks of the other nodes through `kubectl exec`, for which the
leader has a role of its own. A worker waits until it is stopped, longer than the leader needs to drain.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from trtqwen.diagnostics import InputError
from trtqwen.recipe import Recipe

Object = dict[str, Any]
API = "leaderworkerset.x-k8s.io/v1"
LEADER = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}  # a label that the controller sets
SHELL = "rank-shell"
_SHELL_DIRECTORY = "/etc/trtqwen-shell"
SHELL_TEXT = '#!/bin/sh\nhost=$1\nshift\nexec kubectl exec "$host" --container=trtqwen -- /bin/sh -c "$*"\n'
KUBECTL = "ADD --chmod=0755 https://dl.k8s.io/release/v1.33.5/bin/linux/amd64/kubectl /usr/local/bin/kubectl\n"


def check_nodes(recipe: Recipe, nodes: int) -> int:
    """The ranks of each node.

    Raises:
        InputError: if the recipe's ranks cannot be spread over this many nodes.
    """
    if recipe.engine.backend != "tensorrt_llm":
        raise InputError(
            f"recipe {recipe.name}: engine.backend {recipe.engine.backend} runs on one node",
            "take a recipe of backend tensorrt_llm",
        )
    if recipe.world_size % nodes or recipe.world_size == 1:
        raise InputError(
            f"recipe {recipe.name}: its {recipe.world_size} ranks do not divide into {nodes} nodes",
            "change --nodes, or tp_size and pp_size",
        )
    return recipe.world_size // nodes


def group(
    replicas: Any, labels: Mapping[str, str], pod: Object, nodes: int, ranks: int, name: str, drain: int
) -> Object:
    """The spec of the LeaderWorkerSet.

    Args:
        pod: the spec of a pod that serves on one node.
        name: of the ConfigMap with the shell, and of the service account.
        drain: seconds that a worker continues after SIGTERM.
    """
    return {
        "replicas": replicas,
        "startupPolicy": "LeaderCreated",
        "rolloutStrategy": {
            "type": "RollingUpdate",
            "rollingUpdateConfiguration": {"maxSurge": 0, "maxUnavailable": 1},
        },
        "leaderWorkerTemplate": {
            "size": nodes,
            "restartPolicy": "None",  # serve ends when a rank ends, and starts all ranks again
            "leaderTemplate": {"metadata": {"labels": dict(labels)}, "spec": _leader(pod, nodes, ranks, name)},
            "workerTemplate": {"metadata": {"labels": dict(labels)}, "spec": _worker(pod, drain)},
        },
    }


def role(name: str, namespace: str, labels: Mapping[str, str]) -> list[Object]:
    """What lets the leader start ranks in the pods of its namespace."""
    metadata = {"name": name, "labels": dict(labels)}
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["create", "get"]},
    ]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": rules},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        },
    ]


def _leader(pod: Object, nodes: int, ranks: int, name: str) -> Object:
    leader = deepcopy(pod)
    [serve] = leader["containers"]
    own_name = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    hosts = ["$(POD_NAME)", *(f"$(POD_NAME)-{number}" for number in range(1, nodes))]
    serve["env"] = [own_name, *serve["env"]]
    serve["args"] += [f"--rank-host={host}:{ranks}" for host in hosts]
    serve["args"].append(f"--rank-shell={_SHELL_DIRECTORY}/{SHELL}")
    mount = {"name": "shell", "mountPath": _SHELL_DIRECTORY, "readOnly": True}
    serve["volumeMounts"] = [*serve["volumeMounts"], mount]
    workers = " ".join(map(str, range(1, nodes)))
    wait = f'for n in {workers}; do until {_SHELL_DIRECTORY}/{SHELL} "$POD_NAME-$n" true; do sleep 2; done; done'
    [write] = leader["initContainers"]
    waiting = {key: value for key, value in write.items() if key not in ("name", "args", "volumeMounts")}
    waiting |= {"name": "workers", "command": ["/bin/sh", "-c", wait], "env": serve["env"], "volumeMounts": [mount]}
    waiting["volumeMounts"].append({"name": "tmp", "mountPath": "/tmp"})
    leader["initContainers"] = [write, waiting]
    items = [{"key": SHELL, "path": SHELL}]
    leader["volumes"] += [{"name": "shell", "configMap": {"name": name, "defaultMode": 0o555, "items": items}}]
    return leader | {"serviceAccountName": name, "automountServiceAccountToken": True}


def _worker(pod: Object, drain: int) -> Object:
    worker = deepcopy(pod)
    [serve] = worker["containers"]
    for name in ("args", "ports", "startupProbe", "readinessProbe", "livenessProbe"):
        serve.pop(name)
    serve["command"] = ["/bin/sh", "-c", "trap 'exit 0' TERM; sleep infinity & wait"]
    serve["lifecycle"] = {"preStop": {"sleep": {"seconds": drain}}}  # the leader drains meanwhile
    serve["volumeMounts"] = [mount for mount in serve["volumeMounts"] if mount["name"] != "keys"]
    worker["volumes"] = [volume for volume in worker["volumes"] if volume["name"] != "keys"]
    return worker

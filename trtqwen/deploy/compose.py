"""The directory that `trtqwen deploy compose` writes: Triton on its GPUs, and the gateway in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtqwen.deploy.files import Files, to_yaml
from trtqwen.deploy.image import ServingImage, gpus_of
from trtqwen.facts.cards import card_facts
from trtqwen.recipe import Recipe
from trtqwen.triton.ports import Ports
from trtqwen.triton.replicas import PORT_STEP

DRAIN_SECONDS = 60
_EXIT_SECONDS = 20  # from the end of the last request to the end of the process
_HTTP_PORT = 8000  # of Triton, for the health check: not published, and `serve` opens it only if asked to
_LISTEN = ("--triton-host=0.0.0.0", f"--http-port={_HTTP_PORT}")


@dataclass(frozen=True)
class Compose:
    """What is deployed.

    Attributes:
        models: the host's directory with `engines/` and `triton_repo/`, at the path that `trtqwen build` saw.
        keys: the gateway's keys file on the host, relative to compose.yaml.
        port: of the gateway on the host.
    """

    recipe: Recipe
    image: ServingImage
    models: str
    keys: str = "keys.yaml"
    port: int = 8080


def compose_files(plan: Compose) -> Files:
    """The files by their paths below the output directory."""
    return {"compose.yaml": compose_text(plan), "Dockerfile": plan.image.dockerfile}


def compose_text(plan: Compose) -> str:
    """The text of compose.yaml."""
    heading = (
        f"Written by `trtqwen deploy compose {plan.recipe.name}`.\n"
        f"MODELS is the directory in which `trtqwen build {plan.recipe.name}` ran; {plan.keys} holds the API keys."
    )
    return to_yaml(_content(plan), heading=heading)


def _content(plan: Compose) -> dict[str, Any]:
    recipe, ports = plan.recipe, Ports()
    servers = recipe.serve.replicas if recipe.serve.replica_mode == "servers" else 1
    models = f"${{MODELS:-{plan.models}}}"
    repository = f"{models}/triton_repo/{recipe.name}"
    common: dict[str, Any] = {
        "image": plan.image.name,
        "build": ".",
        "volumes": [f"{models}:{models}:ro"],  # an engine is found by its absolute path
        "restart": "unless-stopped",
        "stop_grace_period": f"{DRAIN_SECONDS + _EXIT_SECONDS}s",
        "security_opt": ["no-new-privileges:true"],
        "cap_drop": ["ALL"],
        "logging": {"driver": "local", "options": {"max-size": "50m"}},
    }
    triton: dict[str, Any] = {
        **common,
        "command": [
            "serve",
            f"--repo={repository}",
            "--no-gateway",
            "--triton-host=0.0.0.0",
            f"--http-port={_HTTP_PORT}",
        ],
        "init": True,
        "ipc": "host",  # ranks and Triton's python models share memory
        "ulimits": {"memlock": -1, "stack": 67108864},
        "expose": [
            str(port + PORT_STEP * number) for number in range(servers) for port in (ports.grpc, ports.metrics)
        ],
        "healthcheck": {
            "test": ["CMD-SHELL", " && ".join(_ready(_HTTP_PORT + PORT_STEP * number) for number in range(servers))],
            "interval": "10s",
            "timeout": "10s",
            "start_period": "30m",  # an engine of tens of gigabytes comes from a slow disk
            "start_interval": "2s",
            "retries": 3,
        },
    }
    if gpus := gpus_of(recipe) * recipe.serve.replicas:
        devices = {"driver": "nvidia", "device_ids": [str(gpu) for gpu in range(gpus)], "capabilities": ["gpu"]}
        triton["deploy"] = {"resources": {"reservations": {"devices": [devices]}}}
        if recipe.world_size > 1 and recipe.host is not None and not card_facts(recipe.host.card).peer_to_peer:
            triton["environment"] = {"NCCL_P2P_DISABLE": "1"}
    addresses = [f"--triton=triton:{ports.grpc + PORT_STEP * number}" for number in range(servers)]
    gateway: dict[str, Any] = {
        **common,
        "command": [
            "gateway",
            f"--repo={repository}",
            *addresses,
            "--host=0.0.0.0",
            "--api-keys=/run/secrets/keys.yaml",
            f"--model-name={recipe.name}",
            "--config=/run/configs/gateway.yaml",
        ],
        "ports": [f"{plan.port}:8080"],
        "read_only": True,
        "tmpfs": ["/tmp"],
        "secrets": [{"source": "keys", "target": "keys.yaml"}],
        "configs": [{"source": "gateway", "target": "/run/configs/gateway.yaml"}],
        "depends_on": {"triton": {"condition": "service_healthy"}},
        "healthcheck": {
            "test": ["CMD-SHELL", _answers(8080, "/ready")],
            "interval": "5s",
            "timeout": "5s",
            "start_period": "1m",
            "retries": 3,
        },
    }
    return {
        "name": "trtqwen",
        "services": {"triton": triton, "gateway": gateway},
        "secrets": {"keys": {"file": f"./{plan.keys}"}},
        "configs": {"gateway": {"content": f"drain_seconds: {DRAIN_SECONDS}\n"}},
    }


def _ready(port: int) -> str:
    return _answers(port, "/v2/health/ready")


def _answers(port: int, path: str) -> str:
    """Return a shell command that succeeds if the path answers 200. It uses Python: not all images have curl."""
    url = f"http://127.0.0.1:{port}{path}"
    return f"python3 -c \"import urllib.request as r; r.urlopen('{url}', timeout=5)\""

"""The directory that `trtqwen deploy monitoring` writes: Prometheus, its rules, Grafana and its dashboards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trtqwen.deploy.dashboards import DASHBOARDS, grafana
from trtqwen.deploy.files import Files, to_yaml
from trtqwen.deploy.rules import Thresholds, alert_file, recording_file
from trtqwen.recipe import Recipe
from trtqwen.triton.ports import Ports
from trtqwen.triton.replicas import PORT_STEP

PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
GRAFANA_IMAGE = "grafana/grafana:12.1.0"
_HEADING = "Written by `trtqwen deploy monitoring`."


@dataclass(frozen=True)
class Targets:
    """Where metrics are scraped, each host:port.

    Attributes:
        gateway: gateways.
        triton: metrics endpoints of the Triton servers.
        dcgm: NVIDIA's DCGM exporters, where Triton's own GPU metrics are not enough.
        alertmanager: where alerts are sent.
    """

    gateway: tuple[str, ...] = ("127.0.0.1:8080",)
    triton: tuple[str, ...] = ("127.0.0.1:8002",)
    dcgm: tuple[str, ...] = ()
    alertmanager: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Targets:
        """Return the targets of `trtqwen serve` with its default ports."""
        servers = recipe.serve.replicas if recipe.serve.replica_mode == "servers" else 1
        return cls(triton=tuple(f"127.0.0.1:{Ports().metrics + PORT_STEP * number}" for number in range(servers)))

    def changed(self, **given: Sequence[str] | None) -> Targets:
        """Return these targets with a user's targets in place of the defaults."""
        return replace(self, **{name: tuple(addresses) for name, addresses in given.items() if addresses})


@dataclass(frozen=True)
class Monitoring:
    """What is written.

    Attributes:
        interval: seconds between two scrapes, and between two evaluations of the rules.
    """

    targets: Targets = field(default_factory=Targets)
    thresholds: Thresholds = field(default_factory=Thresholds)
    interval: int = 5


def monitoring_files(plan: Monitoring) -> Files:
    """The files by their paths below the output directory."""
    dashboards = {
        f"grafana/dashboards/{dashboard.uid}.json": json.dumps(grafana(dashboard), indent=2) + "\n"
        for dashboard in DASHBOARDS
    }
    return {
        "prometheus.yml": to_yaml(prometheus_config(plan), heading=_HEADING),
        "rules/trtqwen-recordings.yml": to_yaml(recording_file(), heading=_HEADING),
        "rules/trtqwen-alerts.yml": to_yaml(alert_file(plan.thresholds), heading=_HEADING),
        "grafana/provisioning/datasources/prometheus.yml": to_yaml(_datasource()),
        "grafana/provisioning/dashboards/trtqwen.yml": to_yaml(_provider()),
        **dashboards,
        "compose.yaml": to_yaml(_compose(), heading=f"{_HEADING} Start it with `docker compose up -d`."),
    }


def prometheus_config(plan: Monitoring) -> dict[str, Any]:
    """The content of prometheus.yml; the paths of rule files are relative to it."""
    targets = plan.targets
    jobs = {"trtqwen-gateway": targets.gateway, "trtqwen-triton": targets.triton, "trtqwen-dcgm": targets.dcgm}
    config: dict[str, Any] = {
        "global": {"scrape_interval": f"{plan.interval}s", "evaluation_interval": f"{plan.interval}s"},
        "rule_files": ["rules/*.yml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]}
            for job, addresses in jobs.items()
            if addresses
        ],
    }
    if targets.alertmanager:
        managers = [{"static_configs": [{"targets": list(targets.alertmanager)}]}]
        config["alerting"] = {"alertmanagers": managers}
    return config


def _datasource() -> dict[str, Any]:
    source = {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": "http://127.0.0.1:9090",
        "isDefault": True,
    }
    return {"apiVersion": 1, "datasources": [source]}


def _provider() -> dict[str, Any]:
    provider = {"name": "trtqwen", "type": "file", "options": {"path": "/etc/grafana/dashboards"}}
    return {"apiVersion": 1, "providers": [provider]}


def _compose() -> dict[str, Any]:
    """Return compose.yaml. Both programs use the host's network, so that they reach a server on loopback."""
    prometheus = {
        "image": PROMETHEUS_IMAGE,
        "network_mode": "host",
        "command": [
            "--config.file=/etc/prometheus/prometheus.yml",
            "--storage.tsdb.path=/prometheus",
            "--web.listen-address=127.0.0.1:9090",
        ],
        "volumes": [
            "./prometheus.yml:/etc/prometheus/prometheus.yml:ro",
            "./rules:/etc/prometheus/rules:ro",
            "prometheus:/prometheus",
        ],
        "restart": "unless-stopped",
    }
    visitors = {
        "image": GRAFANA_IMAGE,
        "network_mode": "host",
        "environment": {
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        },
        "volumes": [
            "./grafana/provisioning:/etc/grafana/provisioning:ro",
            "./grafana/dashboards:/etc/grafana/dashboards:ro",
            "grafana:/var/lib/grafana",
        ],
        "restart": "unless-stopped",
    }
    return {
        "name": "trtqwen-monitoring",
        "services": {"prometheus": prometheus, "grafana": visitors},
        "volumes": {"prometheus": {}, "grafana": {}},
    }

"""A real Prometheus scrapes a real server under load, and every query that trtqwen writes has an answer."""

from __future__ import annotations

import json
import math
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.deploy.conftest import Serve, free_port
from tests.deploy.exporter import gpu_exporter
from tests.deploy.programs import program
from tests.waiting import wait_for
from trtqwen.cli.deploy import command
from trtqwen.deploy.dashboards import DASHBOARDS, grafana
from trtqwen.deploy.rules import Thresholds, alerts, recordings

pytestmark = pytest.mark.triton
SELECTOR = re.compile(r"\b((?:trtqwen|nv|DCGM)[\w:]*|up)\b(\{[^}]*\})?")


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.loads(answer.read())["data"]

    def has_data(self, query: str) -> bool:
        """Whether a query returns a number for some series."""
        samples = self.ask("query", query=query)["result"]
        return any(not math.isnan(float(sample["value"][1])) for sample in samples)

    def works(self) -> bool:
        try:
            targets = self.ask("targets")["activeTargets"]
        except OSError:
            return False
        return bool(targets) and all(target["health"] == "up" for target in targets)


def deploy(output: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, ["monitoring", "--output", str(output), *options, "--json"])
    assert result.exit_code == 0, result.output
    written: dict[str, Any] = json.loads(result.stdout)
    return written


@pytest.fixture
def prometheus(serve: Serve, load: None, tmp_path: Path) -> Iterator[Prometheus]:
    with ExitStack() as started:
        options = [
            f"--gateway={serve.gateway.removeprefix('http://')}",
            f"--triton={serve.addresses['metrics'].partition('/')[0]}",
            f"--dcgm={started.enter_context(gpu_exporter())}",
            "--interval=1",
        ]
        deploy(tmp_path / "monitoring", *options)
        port = free_port()
        process = subprocess.Popen(
            [
                program("prometheus", "prometheus"),
                f"--config.file={tmp_path}/monitoring/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=subprocess.DEVNULL,
        )
        started.callback(process.wait)
        started.callback(process.kill)
        running = Prometheus(port)
        assert wait_for(running.works)
        yield running


def test_every_query_has_an_answer(prometheus: Prometheus) -> None:
    queries = {rule.name for rule in recordings()} | {rule.query for rule in recordings()}
    for dashboard in DASHBOARDS:
        queries |= {query.replace("$gateway", ".*").replace("$triton", ".*") for query in dashboard.queries}
    for alert in alerts(Thresholds()):  # a quiet alert returns nothing, but what it compares exists
        queries |= {name + (labels or "") for name, labels in SELECTOR.findall(alert.query)}
    assert len(queries) >= 100
    unanswered = set(queries)

    def ask_again() -> bool:
        unanswered.difference_update([query for query in unanswered if prometheus.has_data(query)])
        return not unanswered

    assert wait_for(ask_again), sorted(unanswered)
    groups = prometheus.ask("rules")["groups"]
    states = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert set(states.values()) == {"ok"}, states
    assert len(states) == len(recordings()) + len(alerts(Thresholds()))


def test_a_directory_is_replaced_only_on_request_and_only_if_nothing_is_lost(tmp_path: Path) -> None:
    output = tmp_path / "monitoring"
    written = deploy(output, "qwen2.5-7b-bf16-tp1x4-4090d")
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.*")) == written["files"]
    for port in (8002, 8012, 8022, 8032):
        assert f"127.0.0.1:{port}\n" in (output / "prometheus.yml").read_text()
    again = CliRunner().invoke(command, ["monitoring", "--output", str(output)])
    assert "exists" in str(again.exception)
    deploy(output, "--alertmanager=127.0.0.1:9093", "--force")
    assert "127.0.0.1:9093" in (output / "prometheus.yml").read_text()
    (output / "mine.txt").write_text("mine")
    refused = CliRunner().invoke(command, ["monitoring", "--output", str(output), "--force"])
    assert "mine.txt" in str(refused.exception)
    assert (output / "mine.txt").read_text() == "mine"


def test_dashboards_fit_the_grid() -> None:
    for dashboard in DASHBOARDS:
        content = grafana(dashboard)
        places: set[tuple[int, int]] = set()
        for panel in content["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & places, panel["title"]
            assert max(x for x, _ in cells) < 24
            places |= cells
        assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])

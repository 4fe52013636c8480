"""`trtqwen top`: its arithmetic against Prometheus' own, its figures from a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from tests.deploy.conftest import Serve
from tests.deploy.exporter import METRICS, gpu_exporter
from tests.deploy.programs import program
from trtqwen.deploy.show import show_glance
from trtqwen.deploy.top import Watch, metrics_url, quantile, read_scrape
from trtqwen.diagnostics import ServerError

BOUNDS = (0.1, 0.5, 1.0, 5.0, inf)


def test_quantiles_are_those_of_prometheus(tmp_path: Path) -> None:
    histograms = [(1, 2, 3, 4, 5), (0, 0, 7, 7, 7), (10, 10, 10, 10, 11), (0, 5, 5, 9, 12), (3, 3, 3, 3, 3)]
    tests = []
    for counts in histograms:
        buckets = dict(zip(BOUNDS, map(float, counts), strict=True))
        series = [
            {"series": f'h_bucket{{le="{"+Inf" if bound == inf else bound}"}}', "values": str(count)}
            for bound, count in zip(BOUNDS, counts, strict=True)
        ]
        samples = [
            {
                "expr": f"round(histogram_quantile({share}, h_bucket), 1e-6)",
                "exp_samples": [{"labels": "{}", "value": round(quantile(share, buckets) or 0, 6)}],
            }
            for share in (0.01, 0.5, 0.9, 0.99, 1)
        ]
        tests.append({"interval": "1m", "input_series": series, "promql_expr_test": samples})
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"tests": tests}))
    result = subprocess.run(
        [program("promtool", "prometheus"), "test", "rules", str(path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.floats(0, 1))
@settings(deadline=None)
def test_a_quantile_lies_within_the_bounds(counts: list[int], share: float) -> None:
    total, buckets = 0, {}
    for bound, count in zip(BOUNDS, counts, strict=True):
        total += count
        buckets[bound] = float(total)
    value = quantile(share, buckets)
    assert (value is None) == (total == 0)
    assert value is None or 0 <= value <= 5


def test_labels_select_samples() -> None:
    scrape = read_scrape('a{x="1",y="2"} 3\na{x="1",y="4"} 5\nb 7\n', 0)
    assert scrape.total("a", x="1") == 8
    assert scrape.total("a", y="4") == 5
    assert scrape.total("a", x="2") is None
    assert scrape.total("b") == 7


def test_addresses() -> None:
    for address in ("h:80", "http://h:80", "http://h:80/", "h:80/metrics", "http://h:80/metrics"):
        assert metrics_url(address).rstrip("/") == "http://h:80/metrics"


def test_nothing_there_is_an_error() -> None:
    with pytest.raises(ServerError, match="no metrics here"):
        Watch(["http://127.0.0.1:9/metrics"], []).look()


@pytest.mark.triton
def test_a_real_server_at_a_glance(serve: Serve, load: None) -> None:
    with gpu_exporter() as gpus:
        command = [sys.executable, "-m", "trtqwen", "top", f"--url={serve.gateway}"]
        command += [f"--triton={serve.addresses['metrics']}", f"--triton={gpus}", "--triton=127.0.0.1:9"]
        glance = json.loads(subprocess.check_output([*command, "--interval=5", "--json"], text=True))
        text = subprocess.check_output([*command, "--interval=1", "--once"], text=True)
    assert glance["ready"] is True
    assert glance["requests"] > 0
    assert glance["output_tokens"] > 0
    assert glance["prompt_tokens"] > glance["output_tokens"]
    assert 0 < glance["latencies"]["first token"]["p50"] <= glance["latencies"]["request"]["p99"]
    [replica] = glance["replicas"]
    assert (replica["name"], replica["up"]) == (serve.addresses["grpc"], True)
    [engine] = glance["engines"]
    assert engine["batch"] == 16
    assert engine["steps"] > 0
    assert METRICS.count("nv_gpu_power") == len(glance["gpus"]) == 1
    assert glance["gpus"][0]["utilization"] == 0.61
    assert glance["silent"] == ["http://127.0.0.1:9/metrics"]
    for words in ("output tokens/s", "first token", serve.addresses["grpc"], "61%", "no answer from"):
        assert words in text


def test_it_draws_before_the_first_rate() -> None:
    with gpu_exporter() as gpus:
        glance = Watch([], [f"http://{gpus}"]).look()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show_glance(glance))
    assert "GPU-11111111" in console.export_text()


def test_help_names_the_defaults() -> None:
    from trtqwen.cli import app

    assert "127.0.0.1:8002" in CliRunner().invoke(app, ["top", "--help"]).output

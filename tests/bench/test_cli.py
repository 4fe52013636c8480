"""`trtqwen bench` on a real Triton, and what it writes."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.command_line import trtqwen
from tests.triton.conftest import repository, server  # noqa: F401
from trtqwen.bench.roofline import Bound, ImpossibleRate, bound, check_rate
from trtqwen.hf.known import known_config
from trtqwen.recipe import CheckpointRecipe
from trtqwen.triton.server import TritonServer


@pytest.mark.triton
def test_bench_over_grpc(server: TritonServer, tmp_path: Path) -> None:  # noqa: F811
    done = trtqwen(
        *("bench", server.grpc_url, "--workload", "smoke", "--requests", "8", "--concurrency", "4"),
        *("--goodput", "request_latency:60000", "--output", str(tmp_path), "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["success_rate"]["avg"] == 1
    assert report["output_sequence_length"]["min"] == report["output_sequence_length"]["max"] == 32
    assert report["goodput"]["avg"] == pytest.approx(report["request_throughput"]["avg"])
    assert report["time_to_first_token"]["p99"] <= report["request_latency"]["p99"]
    assert report["about"]["server"].startswith("triton")
    assert len(report["input_config"]["workload"]["sha256"]) == 3
    rows = list(csv.DictReader((tmp_path / "requests.csv").open()))
    assert len(rows) == 24
    assert all(float(row["sent"]) <= float(row["first"]) <= float(row["ended"]) for row in rows)
    page = (tmp_path / "report.html").read_text()
    assert "http" not in "".join(_links(page))
    assert page.count("<svg") == 2


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            str(value) for name, value in attrs if name in ("src", "href") and tag in ("script", "link", "img")
        ]


def _links(page: str) -> list[str]:
    parser = _Links()
    parser.feed(page)
    return parser.found


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("127.0.0.1:9",), 1, "no Triton server answers"),
        (("http://127.0.0.1:9",), 1, "does not answer"),
        (("127.0.0.1:9", "--goodput", "ttft:5"), 2, "time_to_first_token"),
        (("127.0.0.1:9", "--repeats", "2"), 2, "greater than or equal to 3"),
    ],
)
def test_bad_usage_is_one_sentence(words: tuple[str, ...], code: int, message: str) -> None:
    done = trtqwen("bench", *words)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_impossible_rates_are_refused() -> None:
    """Qwen2.5-7B in 16 bits reads 14.1 GB a step: at 1008 GB/s 71 steps a second."""
    limit = bound(
        known_config("qwen2.5-7b"), CheckpointRecipe(dtype="float16"), "rtx-4090d", replicas=1, concurrency=8
    )
    assert limit.bandwidth / 8 == pytest.approx(71, rel=0.02)
    check_rate(8 * 60, limit, "the card")
    with pytest.raises(ImpossibleRate, match="700 output tokens/s were measured"):
        check_rate(700, limit, "the card")
    assert Bound(100, 50).rate == 50

"""The table of models, the choice of a target, and the report: without a server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from trtqwen.diagnostics import InputError
from trtqwen.gateway.fleet import client
from trtqwen.gateway.fleet.observe import agreement
from trtqwen.gateway.fleet.report import Spread, lines, report
from trtqwen.gateway.fleet.routing import choose
from trtqwen.gateway.fleet.table import (
    ModelEntry,
    ModelTable,
    parse_entry,
    parse_table,
    read_table,
    revision,
    write_table,
)
from trtqwen.gateway.metrics import Metrics

ONE = {"name": "one", "repository": "/srv/one", "triton": ["a:1"]}
TWO = {"name": "two", "repository": "/srv/two", "triton": ["b:1"]}


def entry(*targets: dict[str, Any], **more: Any) -> ModelEntry:
    return parse_entry({"targets": list(targets), **more}, "qwen")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "models"),
        ({"models": {}}, "models"),
        ({"models": {"qwen": {"targets": []}}}, "targets"),
        ({"models": {"qwen": {"targets": [{**ONE, "weight": 0}]}}}, "weight"),
        ({"models": {"qwen": {"targets": [{**ONE, "shadow": 1}]}}}, "weight"),
        ({"models": {"qwen": {"targets": [{**ONE, "weight": 1, "shadow": 0.5}]}}}, "both weight and shadow"),
        ({"models": {"qwen": {"targets": [{**ONE, "shadow": 1.5}, TWO]}}}, "shadow"),
        ({"models": {"qwen": {"targets": [{**ONE, "weight": -1}]}}}, "weight"),
        ({"models": {"qwen": {"targets": [{**ONE, "weight": float("inf")}]}}}, "weight"),
        ({"models": {"qwen": {"targets": [ONE, {**TWO, "name": "one"}]}}}, "name one"),
        ({"models": {"qwen": {"targets": [ONE, {**TWO, "triton": ["a:1"]}]}}}, "a:1"),
        ({"models": {"qwen": {"targets": [{**ONE, "gpus": [0]}]}}}, "gpus"),
        ({"models": {"qwen": {"targets": [{**ONE, "triton": ["nowhere"]}]}}}, "host:port"),
        ({"models": {"qwen": {"targets": [ONE], "aliases": ["qwen"]}}}, "given twice"),
        ({"models": {"qwen": {"targets": [ONE]}}, "default": "other"}, "other"),
        ({"models": {"../qwen": {"targets": [ONE]}}}, "../qwen"),
        ({"models": {"qwen": {"targets": [ONE], "colour": "red"}}}, "colour"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_the_field(content: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        parse_table(content)


def test_a_table_survives_its_file_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  qwen:\n    targets:\n      - {name: one, repository: sub/one, weight: 3}\n")
    table = read_table(path)
    assert table.models["qwen"].targets[0].repository == tmp_path / "sub" / "one"
    wider = table.with_entry("other", entry(TWO, aliases=["gpt-4o"]))
    write_table(path, wider)
    assert read_table(path) == wider
    assert revision(wider) != revision(table)
    assert read_table(path).with_entry("other", None) == table
    with pytest.raises(InputError, match="only model"):
        table.with_entry("qwen", None)


def share(weights: dict[str, float], whos: list[str | None]) -> Counter[str]:
    return Counter(choose([*weights], weights.__getitem__, str, who, "qwen") for who in whos)


def within(count: int, of: int, probability: float) -> bool:
    """Within five standard deviations of a binomial distribution."""
    return bool(abs(count - of * probability) < 5 * (of * probability * (1 - probability)) ** 0.5)


@pytest.mark.parametrize("percent", [1, 5, 30, 60])
def test_shares_are_the_weights_and_keys_stay(percent: float) -> None:
    weights = {"stable": 100 - percent, "canary": percent}
    keys: list[str | None] = [f"key {number}" for number in range(5000)]
    assert within(share(weights, keys)["canary"], 5000, percent / 100)
    assert within(share(weights, [None] * 5000)["canary"], 5000, percent / 100)
    assert share(weights, keys) == share(weights, keys)


def test_a_growing_canary_keeps_its_keys() -> None:
    keys: list[str | None] = [f"key {number}" for number in range(2000)]
    before: set[str | None] = set()
    for percent in (1, 5, 20, 50, 90):
        weights = {"stable": 100.0 - percent, "canary": float(percent)}
        now = {key for key in keys if share(weights, [key])["canary"]}
        assert before <= now
        before = now


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 1), ("abc", "abc", 1), ("abcd", "ab", 0.5), ("abcd", "abxd", 0.5), ("", "a", 0), ("x", "a", 0)],
)
def test_agreement_is_the_share_that_both_begin_with(one: str, other: str, expected: float) -> None:
    assert agreement(one, other) == agreement(other, one) == expected


def observed(
    metrics: Metrics, target: str, count: int, first: float, failed: int = 0, role: str = "serve", jitter: float = 0.3
) -> None:
    """Record requests with times around a mean."""
    for number in range(count):
        factor = 1 + jitter * (2 * (number % 10) / 9 - 1)
        metrics.target_first_token_seconds.labels("qwen", target, role).observe(first * factor)
        metrics.target_seconds.labels("qwen", target, role).observe(10 * first * factor)
    metrics.target_requests.labels("qwen", target, role, "answered").inc(count)
    metrics.target_requests.labels("qwen", target, role, "failed").inc(failed)
    metrics.target_requests.labels("qwen", target, role, "left").inc(3)


def figures(metrics: Metrics) -> Any:
    metrics.target_stable.labels("qwen", "stable").set(1)
    [model] = report([generate_latest(metrics._registry).decode()])
    return model.targets


@pytest.mark.parametrize(
    ("first", "failed", "expected"),
    [(0.04, 0, "better"), (0.16, 0, "worse"), (0.08, 0, "no difference seen"), (0.04, 60, "worse")],
)
def test_the_report_says_which_is_better(first: float, failed: int, expected: str) -> None:
    metrics = Metrics()
    observed(metrics, "stable", 400, 0.08)
    observed(metrics, "next", 200, first, failed)
    stable, other = figures(metrics)
    assert (stable.name, other.name) == ("stable", "next")
    assert other.verdicts["whole"] == expected
    assert other.requests == 200 + failed
    assert other.failed_share == pytest.approx(failed / (200 + failed))
    assert other.times["target_time_to_first_token_seconds"].mean == pytest.approx(first)


def test_few_requests_allow_no_verdict() -> None:
    metrics = Metrics()
    observed(metrics, "stable", 400, 0.08)
    observed(metrics, "next", 10, 0.01)
    assert figures(metrics)[1].verdicts == {"whole": "too few requests"}


def test_the_report_sums_gateways_and_counts_equal_answers() -> None:
    metrics = Metrics()
    observed(metrics, "stable", 50, 0.08)
    observed(metrics, "next", 40, 0.08, role="shadow")
    metrics.target_stable.labels("qwen", "stable").set(1)
    metrics.shadow_answers.labels("qwen", "next", "greedy", "same").inc(30)
    metrics.shadow_answers.labels("qwen", "next", "greedy", "different").inc(10)
    metrics.shadow_agreement.labels("qwen", "next").observe(0.5)
    text = generate_latest(metrics._registry).decode()
    [model] = report([text, text])
    shadow = model.targets[1]
    assert shadow.requests == 80
    assert shadow.copies == {"greedy": {"same": 60, "different": 20}}
    assert shadow.agreement.mean == 0.5
    told = "\n".join(lines([model]))
    assert "next (shadow): 80 requests" in told
    assert "60 of 80 greedy; agreement 0.500" in told


def test_percentiles_interpolate_as_prometheus_does() -> None:
    spread = Spread(10, 1.0, {0.1: 5, 0.2: 10, float("inf"): 10})
    assert spread.percentile(0.5) == pytest.approx(0.1)
    assert spread.percentile(0.75) == pytest.approx(0.15)


def test_edits_of_an_entry() -> None:
    one = client.new_target(Path("/srv/one"), ["a:1"])
    two = client.new_target(Path("/srv/two"), ["b:1"])
    alone = client.replaced(None, one)
    assert alone.targets == (one,)
    tried = client.with_canary(alone, two, 5, "qwen")
    assert [(target.name, target.share) for target in tried.targets] == [("one", 95), ("two", 5)]
    more = client.with_canary(tried, "two", 60, "qwen")
    assert more.stable.name == "one"
    assert [target.name for target in client.rolled_back(more, "qwen").targets] == ["one"]
    assert client.promoted(more, None, "qwen").targets == (two,)
    seen = client.with_shadow(alone, two, 50, "qwen")
    assert seen.targets[1].shadow == 0.5
    assert client.promoted(seen, "two", "qwen").targets == (two,)
    for known, target in ((None, two), (alone, one), (alone, "three")):
        with pytest.raises(InputError):
            client.with_canary(known, target, 5, "qwen")
    with pytest.raises(InputError):
        client.promoted(alone, None, "qwen")


def test_a_table_holds_an_address_once(tmp_path: Path) -> None:
    table = ModelTable(models={"qwen": entry(ONE)})
    with pytest.raises(InputError, match="a:1"):
        table.with_entry("other", entry(ONE))

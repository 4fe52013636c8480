"""Comparison of targets: figures and verdicts from the gateway's metrics.

Differences count when they are beyond chance: a z-test of two means (Welch's, with the variance that the histogram's
buckets show) and of two shares, at three standard errors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "trtqwen_gateway_"
_SIGMAS = 3.0
_FEWEST = 30  # requests of each target, for a verdict
Verdict = Literal["better", "worse", "no difference seen", "too few requests"]
MEASURES = {
    "target_time_to_first_token_seconds": "first token",
    "target_token_seconds": "between tokens",
    "target_request_seconds": "request",
}


@dataclass
class Spread:
    """A histogram: counts up to each bound, cumulative; times in seconds."""

    count: float = 0
    total: float = 0
    buckets: dict[float, float] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def percentile(self, share: float) -> float | None:
        """By linear interpolation within a bucket, as Prometheus does."""
        if not self.count:
            return None
        rank, low, before = share * self.count, 0.0, 0.0
        for bound, count in sorted(self.buckets.items()):
            if count >= rank:
                if math.isinf(bound):
                    return low
                return low + (bound - low) * (rank - before) / max(count - before, 1e-12)
            low, before = bound, count
        return low

    @property
    def variance(self) -> float:
        """Of the values, taken at the middle of their buckets."""
        mean, squares, low, before = self.mean or 0.0, 0.0, 0.0, 0.0
        for bound, count in sorted(self.buckets.items()):
            high = 2 * low if math.isinf(bound) else bound
            squares += (count - before) * (((low + high) / 2 - mean) ** 2 + (high - low) ** 2 / 12)
            low, before = high, count
        return squares / self.count if self.count else 0.0


@dataclass
class TargetFigures:
    """Figures of one target.

    Attributes:
        outcomes: requests by how they ended: answered, failed, refused, left.
        tokens: of its answers.
        times: by measure.
        copies: of a shadow: by sampling (greedy or sampled), copies by result.
        agreement: of a shadow: the mean share of the client's answer that its own begins with.
        verdicts: against the stable target, by measure and as a whole.
    """

    name: str
    role: str
    weight: float = 0
    outcomes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: float = 0
    times: dict[str, Spread] = field(default_factory=lambda: defaultdict(Spread))
    copies: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    agreement: Spread = field(default_factory=Spread)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def requests(self) -> float:
        """Return the number of requests without those whose client disconnected."""
        return sum(count for outcome, count in self.outcomes.items() if outcome != "left")

    @property
    def failed_share(self) -> float:
        return self.outcomes["failed"] / self.requests if self.requests else 0.0

    def as_json(self) -> dict[str, Any]:
        times = {
            MEASURES[name].replace(" ", "_"): {
                "count": spread.count,
                "mean_seconds": spread.mean,
                "p50_seconds": spread.percentile(0.5),
                "p95_seconds": spread.percentile(0.95),
            }
            for name, spread in self.times.items()
        }
        return {
            "target": self.name,
            "role": self.role,
            "weight": self.weight,
            "outcomes": dict(self.outcomes),
            "output_tokens": self.tokens,
            "times": times,
            "copies": {sampling: dict(results) for sampling, results in self.copies.items()},
            "agreement": self.agreement.mean,
            "verdicts": self.verdicts,
        }


@dataclass
class ModelReport:
    """The targets of a model, the stable one first."""

    name: str
    targets: list[TargetFigures]

    def as_json(self) -> dict[str, Any]:
        return {"model": self.name, "targets": [target.as_json() for target in self.targets]}


def report(texts: Iterable[str]) -> list[ModelReport]:
    """Figures of all models.

    Args:
        texts: metrics of each gateway, as `/metrics` has them.
    """
    found: dict[str, dict[tuple[str, str], TargetFigures]] = defaultdict(dict)
    weights: dict[tuple[str, str], float] = {}
    stable: dict[str, str] = {}
    shadows: list[tuple[str, Mapping[str, str], float]] = []
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels: Mapping[str, str] = sample.labels
                if not sample.name.startswith(_PREFIX) or "target" not in labels:
                    continue
                name = sample.name.removeprefix(_PREFIX)
                if name == "target_weight":
                    weights[labels["model"], labels["target"]] = sample.value
                elif name == "target_stable":
                    if sample.value:
                        stable[labels["model"]] = labels["target"]
                elif name.startswith("shadow_"):
                    shadows.append((name, labels, sample.value))
                elif "role" in labels:
                    key = labels["target"], labels["role"]
                    figures = found[labels["model"]].setdefault(key, TargetFigures(*key))
                    _add(figures, name, labels, sample.value)
    for name, labels, value in shadows:
        key = labels["target"], "shadow"
        figures = found[labels["model"]].setdefault(key, TargetFigures(*key))
        if name == "shadow_answers_total":
            figures.copies[labels["sampling"]][labels["result"]] += value
        else:
            _add_spread(figures.agreement, name.removeprefix("shadow_agreement"), labels, value)
    reports = []
    for model, targets in sorted(found.items()):
        for (target, role), figures in targets.items():
            figures.weight = weights.get((model, target), 0.0) if role == "serve" else 0.0
        first = stable.get(model)
        ordered = sorted(targets.values(), key=lambda one: (one.role, one.name != first, -one.weight, one.name))
        for one in ordered[1:]:
            one.verdicts = compare(ordered[0], one)
        reports.append(ModelReport(model, ordered))
    return reports


def _add(figures: TargetFigures, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == "target_requests_total":
        figures.outcomes[labels["outcome"]] += value
    elif name == "target_output_tokens_total":
        figures.tokens += value
    else:
        for measure in MEASURES:
            if name.startswith(measure):
                _add_spread(figures.times[measure], name.removeprefix(measure), labels, value)


def _add_spread(spread: Spread, part: str, labels: Mapping[str, str], value: float) -> None:
    if part == "_count":
        spread.count += value
    elif part == "_sum":
        spread.total += value
    elif part == "_bucket":
        bound = float(labels["le"])
        spread.buckets[bound] = spread.buckets.get(bound, 0.0) + value


def compare(stable: TargetFigures, other: TargetFigures) -> dict[str, Verdict]:
    """Whether another target is better than the stable one: in failures, in each time, and as a whole.

    As a whole, it is worse if any measure is worse, and better if some measure is better and none is worse.
    """
    if min(stable.requests, other.requests) < _FEWEST:
        return {"whole": "too few requests"}
    verdicts: dict[str, Verdict] = {"failures": _verdict(_failures_z(stable, other))}
    for measure, title in MEASURES.items():
        one, two = stable.times[measure], other.times[measure]
        if min(one.count, two.count) >= _FEWEST:
            verdicts[title] = _verdict(_means_z(one, two))
    seen = set(verdicts.values())
    whole: Verdict = "worse" if "worse" in seen else "better" if "better" in seen else "no difference seen"
    return verdicts | {"whole": whole}


def _verdict(z: float) -> Verdict:
    return "better" if z < -_SIGMAS else "worse" if z > _SIGMAS else "no difference seen"


def _means_z(one: Spread, two: Spread) -> float:
    error = math.sqrt(one.variance / one.count + two.variance / two.count)
    return ((two.mean or 0.0) - (one.mean or 0.0)) / error if error else 0.0


def _failures_z(one: TargetFigures, two: TargetFigures) -> float:
    pooled = (one.outcomes["failed"] + two.outcomes["failed"]) / (one.requests + two.requests)
    error = math.sqrt(pooled * (1 - pooled) * (1 / one.requests + 1 / two.requests))
    return (two.failed_share - one.failed_share) / error if error else 0.0


def lines(models: Sequence[ModelReport]) -> list[str]:
    """Format the report as text, with some lines for each target."""
    told: list[str] = []
    for model in models:
        told.append(model.name)
        for one in model.targets:
            share = "shadow" if one.role == "shadow" else f"{100 * one.weight:.3g} %"
            failed = f"{100 * one.failed_share:.3g} % failed"
            told.append(f"  {one.name} ({share}): {one.requests:.0f} requests, {failed}, {one.tokens:.0f} tokens")
            times = [f"{title} {_times(one.times[measure])}" for measure, title in MEASURES.items()]
            told.append(f"    {', '.join(times)}")
            if answers := _answers(one):
                told.append(f"    same answers: {answers}; agreement {one.agreement.mean or 0:.3f}")
            if one.verdicts:
                parts = [f"{name} {verdict}" for name, verdict in one.verdicts.items() if verdict in _TOLD]
                reasons = [part for part in parts if not part.startswith("whole")]
                because = f" ({', '.join(reasons)})" if reasons else ""
                told.append(f"    against {model.targets[0].name}: {one.verdicts['whole']}{because}")
    return told


_TOLD = ("better", "worse")


def _times(spread: Spread) -> str:
    if spread.mean is None:
        return "-"
    return f"{1000 * spread.mean:.4g} ms (P95 {1000 * (spread.percentile(0.95) or 0):.4g})"


def _answers(one: TargetFigures) -> str:
    told = []
    for sampling, results in sorted(one.copies.items()):
        if compared := results.get("same", 0) + results.get("different", 0):
            told.append(f"{results.get('same', 0):.0f} of {compared:.0f} {sampling}")
    return ", ".join(told)

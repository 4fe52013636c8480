"""The target of a search: the highest throughput within limits on latency."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtqwen.bench.figures import Figures
from trtqwen.diagnostics import InputError

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_TITLES = {"time_to_first_token": "time to first token", "inter_token_latency": "time between tokens"}


def milliseconds(text: str) -> float:
    """A time with its unit: `500ms`, `0.5s`.

    Raises:
        InputError: if there is no unit, or no positive number.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*(us|ms|s)\s*", text)
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise InputError(f"{text!r} is not a time", "write a number with its unit, like 500ms or 0.5s")
    return value


@dataclass(frozen=True)
class Measures:
    """The measures of a run. Latencies in milliseconds, throughput in output tokens per second.

    Attributes:
        time_to_first_token, inter_token_latency: at the target's percentile; `inter_token_latency` is 0 where every
            answer has one token.
        success_rate: of all requests.
    """

    throughput: float
    mean_latency: float
    time_to_first_token: float
    inter_token_latency: float
    success_rate: float


@dataclass(frozen=True)
class Miss:
    """A limit that a configuration exceeds, and the excess as a share of the limit."""

    what: str
    excess: float


@dataclass(frozen=True)
class Target:
    """Limits in milliseconds; None is no limit.

    Attributes:
        percentile: of the requests for which the limits apply.
        success_rate: the least.
    """

    time_to_first_token: float | None = None
    inter_token_latency: float | None = None
    percentile: int = 95
    success_rate: float = 1.0

    def measures(self, figures: Figures) -> Measures:
        """Return the measures of a run's figures."""

        def at(name: str) -> float:
            found = figures.distributions.get(name)
            return 0.0 if found is None else found.percentiles[self.percentile]

        return Measures(
            throughput=figures.rates["output_token_throughput"].avg,
            mean_latency=figures.distributions["request_latency"].avg,
            time_to_first_token=at("time_to_first_token"),
            inter_token_latency=at("inter_token_latency"),
            success_rate=figures.rates["success_rate"].avg,
        )

    def misses(self, measures: Measures) -> tuple[Miss, ...]:
        """Every limit that is exceeded, the worst first."""
        found = []
        for name, title in _TITLES.items():
            limit, value = getattr(self, name), getattr(measures, name)
            if limit is not None and value > limit:
                what = f"{self.percentile}th percentile of the {title} is {value:.4g} ms, the limit {limit:g} ms"
                found.append(Miss(what, value / limit - 1))
        if measures.success_rate < self.success_rate:
            what = f"success rate is {measures.success_rate:.1%}, the least {self.success_rate:.1%}"
            found.append(Miss(what, self.success_rate / max(measures.success_rate, 1e-9) - 1))
        return tuple(sorted(found, key=lambda miss: -miss.excess))

    def rank(self, measures: Measures) -> tuple[float, float]:
        """Return the sort key, the best first: by throughput within the limits, then by the excess."""
        misses = self.misses(measures)
        return (misses[0].excess if misses else 0.0), -measures.throughput

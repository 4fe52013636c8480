"""Figures of a load test, with the names that NVIDIA's AIPerf gives them, and their 95 % confidence intervals.

Sources: AIPerf's metrics reference for names and definitions; `inter_token_latency` is (latency - time to first
token) / (tokens - 1) of each request, `inter_chunk_latency` the time between two pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtqwen.bench.records import ClientLoad, RequestRecord

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
# Student's t for 95 %, two sides, by degrees of freedom; beyond the table the normal distribution's 1.96 is close.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_BUSY_CPU = 0.85  # share of a processor above which a client process counts as the bottleneck
_LATE_SHARE = 0.05  # its event loop's lag, as a share of the median gap between pieces or time to first token


@dataclass(frozen=True)
class Distribution:
    """Values of one kind over all requests of all repeats.

    Attributes:
        avg_ci95, p50_ci95, p99_ci95: half the width of the 95 % confidence interval over the repeats; None for fewer
            than two of them.
    """

    unit: str
    count: int
    avg: float
    std: float
    min: float
    max: float
    percentiles: Mapping[int, float]
    avg_ci95: float | None
    p50_ci95: float | None
    p99_ci95: float | None

    def as_json(self) -> dict[str, object]:
        values: dict[str, object] = {"unit": self.unit, "count": self.count, "avg": self.avg, "std": self.std}
        values |= {"min": self.min, "max": self.max, **{f"p{rank}": x for rank, x in self.percentiles.items()}}
        return values | {"avg_ci95": self.avg_ci95, "p50_ci95": self.p50_ci95, "p99_ci95": self.p99_ci95}


@dataclass(frozen=True)
class Rate:
    """A figure of a whole run: its mean over the repeats, and half the width of its confidence interval."""

    unit: str
    avg: float
    ci95: float | None
    repeats: tuple[float, ...]

    def as_json(self) -> dict[str, object]:
        return {"unit": self.unit, "avg": self.avg, "ci95": self.ci95, "repeats": list(self.repeats)}


@dataclass(frozen=True)
class Goodput:
    """Limits of a good request in milliseconds; None is no limit."""

    time_to_first_token: float | None = None
    inter_token_latency: float | None = None
    request_latency: float | None = None

    def met(self, record: RequestRecord) -> bool:
        pairs = (
            (self.time_to_first_token, record.time_to_first_token),
            (self.inter_token_latency, record.inter_token_latency or 0.0),
            (self.request_latency, record.latency),
        )
        return record.ok and all(limit is None or value * 1000 <= limit for limit, value in pairs)


@dataclass(frozen=True)
class ClientHealth:
    """Whether the load generator kept up.

    Attributes:
        cpu_share: of its busiest process.
        lag_p95_ms: lateness of its event loops, 95th percentile.
        bottleneck: why the client limited the measurement; None if it kept up.
    """

    cpu_share: float
    lag_p95_ms: float
    bottleneck: str | None


@dataclass(frozen=True)
class Figures:
    """All figures of a load test.

    Attributes:
        rates: by AIPerf's names.
        distributions: by AIPerf's names.
        errors: number of requests by error.
    """

    rates: Mapping[str, Rate]
    distributions: Mapping[str, Distribution]
    errors: Mapping[str, int]
    client: ClientHealth

    def as_json(self) -> dict[str, object]:
        figures: dict[str, object] = {name: rate.as_json() for name, rate in self.rates.items()}
        figures |= {name: distribution.as_json() for name, distribution in self.distributions.items()}
        return figures | {"error_summary": dict(self.errors), "client": vars(self.client)}


def confidence(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    factor = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96
    return factor * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def figures(
    repeats: Sequence[Sequence[RequestRecord]], clients: Sequence[ClientLoad], goodput: Goodput | None = None
) -> Figures:
    """Compute the figures of a test.

    Args:
        repeats: the records of each repeat; none of them is empty.
        clients: of all processes in all repeats.
        goodput: limits that good requests keep; None leaves goodput out.
    """
    rates = {name: _rate(unit, repeats, value) for name, (unit, value) in _rates(goodput).items()}
    distributions: dict[str, Distribution] = {}
    for name, (unit, values) in _VALUES.items():
        found = [values(records) for records in repeats]
        if any(found):
            distributions[name] = _distribution(unit, [part for part in found if part])
    errors: dict[str, int] = {}
    for record in (record for records in repeats for record in records):
        if record.error is not None:
            errors[record.error] = errors.get(record.error, 0) + 1
    return Figures(rates, distributions, errors, client_health(clients, distributions))


def client_health(clients: Sequence[ClientLoad], distributions: Mapping[str, Distribution]) -> ClientHealth:
    """Whether the load generator kept up with what it measured."""
    cpu = max((client.cpu_share for client in clients), default=0.0)
    lags = [lag for client in clients for lag in client.lags]
    lag = float(np.percentile(lags, 95)) * 1000 if lags else 0.0
    first = distributions.get("time_to_first_token")
    limit = max(2.0, _LATE_SHARE * first.percentiles[50]) if first else math.inf
    why = None
    if cpu > _BUSY_CPU:
        why = f"a client process used {cpu:.0%} of a processor"
    elif lag > limit:
        why = f"the client woke up {lag:.1f} ms late (95th percentile), more than {limit:.1f} ms"
    return ClientHealth(cpu, lag, why)


def duration(records: Sequence[RequestRecord]) -> float:
    """Seconds from the first request sent to the last answer complete."""
    return max(record.ended for record in records) - min(record.sent for record in records)


def _good(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    return [record for record in records if record.ok]


def _rates(goodput: Goodput | None) -> dict[str, tuple[str, Callable[[Sequence[RequestRecord]], float]]]:
    def per_second(count: Callable[[RequestRecord], float]) -> Callable[[Sequence[RequestRecord]], float]:
        return lambda records: sum(map(count, _good(records))) / (duration(records) or math.inf)

    rates: dict[str, tuple[str, Callable[[Sequence[RequestRecord]], float]]] = {
        "request_throughput": ("requests/sec", per_second(lambda record: 1)),
        "output_token_throughput": ("tokens/sec", per_second(lambda record: record.output_tokens)),
        "total_token_throughput": (
            "tokens/sec",
            per_second(lambda record: record.prompt_tokens + record.output_tokens),
        ),
        "request_count": ("requests", len),
        "error_request_count": ("requests", lambda records: sum(not record.ok for record in records)),
        "early_stop_count": ("requests", lambda records: sum(record.early_stop for record in records)),
        "success_rate": ("ratio", lambda records: len(_good(records)) / len(records)),
        "benchmark_duration": ("sec", duration),
    }
    if goodput is not None:
        rates["goodput"] = ("requests/sec", per_second(goodput.met))
    return rates


_VALUES: dict[str, tuple[str, Callable[[Sequence[RequestRecord]], list[float]]]] = {
    "time_to_first_token": ("ms", lambda rs: [record.time_to_first_token * 1000 for record in _good(rs)]),
    "inter_token_latency": (
        "ms",
        lambda rs: [1000 * value for record in _good(rs) if (value := record.inter_token_latency) is not None],
    ),
    "inter_chunk_latency": ("ms", lambda rs: [gap * 1000 for record in _good(rs) for gap in record.gaps]),
    "request_latency": ("ms", lambda rs: [record.latency * 1000 for record in _good(rs)]),
    "output_token_throughput_per_user": (
        "tokens/sec/user",
        lambda rs: [1 / value for record in _good(rs) if (value := record.inter_token_latency)],
    ),
    "input_sequence_length": ("tokens", lambda rs: [float(record.prompt_tokens) for record in _good(rs)]),
    "output_sequence_length": ("tokens", lambda rs: [float(record.output_tokens) for record in _good(rs)]),
    "send_lag": ("ms", lambda rs: [(record.sent - record.due) * 1000 for record in rs]),
}


def _rate(
    unit: str, repeats: Sequence[Sequence[RequestRecord]], value: Callable[[Sequence[RequestRecord]], float]
) -> Rate:
    values = tuple(float(value(records)) for records in repeats)
    return Rate(unit, float(np.mean(values)), confidence(values), values)


def _distribution(unit: str, parts: Sequence[Sequence[float]]) -> Distribution:
    values = np.concatenate([np.asarray(part) for part in parts])

    def interval(of: Callable[[Sequence[float]], float]) -> float | None:
        return confidence([of(part) for part in parts])

    return Distribution(
        unit=unit,
        count=values.size,
        avg=float(values.mean()),
        std=float(values.std()),
        min=float(values.min()),
        max=float(values.max()),
        percentiles={rank: float(np.percentile(values, rank)) for rank in PERCENTILES},
        avg_ci95=interval(lambda part: float(np.mean(part))),
        p50_ci95=interval(lambda part: float(np.percentile(part, 50))),
        p99_ci95=interval(lambda part: float(np.percentile(part, 99))),
    )

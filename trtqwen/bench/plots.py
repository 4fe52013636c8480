"""Plots of load tests as inline SVG. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtqwen.bench.records import RequestRecord
from trtqwen.verify.plot import can_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Repeats = Sequence[Sequence[RequestRecord]]


def latency_plot(tests: Mapping[str, Repeats]) -> str:
    """Cumulative distributions of time to first token, time between tokens and latency, one line for each test."""
    if not can_plot():
        return _without_matplotlib()
    kinds: dict[str, Callable[[RequestRecord], float | None]] = {
        "time to first token, ms": lambda record: record.time_to_first_token,
        "inter-token latency, ms": lambda record: record.inter_token_latency,
        "request latency, ms": lambda record: record.latency,
    }
    figure, axes = _figure(len(kinds))
    for axis, (label, value) in zip(axes, kinds.items(), strict=True):
        for name, repeats in tests.items():
            found = [value(record) for records in repeats for record in records if record.ok]
            values = np.sort([1000 * x for x in found if x is not None])
            if values.size:
                axis.step(values, np.arange(1, values.size + 1) / values.size, where="post", label=name)
        axis.set_xlabel(label)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def throughput_plot(tests: Mapping[str, Repeats]) -> str:
    """Output tokens per second over the time of the last repeat, in twenty steps."""
    if not can_plot():
        return _without_matplotlib()
    figure, [axis] = _figure(1)
    for name, repeats in tests.items():
        pieces = [(time, share) for record in repeats[-1] if record.ok for time, share in _spread(record)]
        begin = min(record.sent for record in repeats[-1])
        end = max(record.ended for record in repeats[-1])
        counts, edges = np.histogram(
            [time - begin for time, _ in pieces],
            bins=20,
            range=(0, max(end - begin, 1e-6)),
            weights=[share for _, share in pieces],
        )
        axis.step(edges[:-1], counts / np.diff(edges), where="post", label=name)
    axis.set_xlabel("seconds since the start of the last repeat")
    axis.set_ylabel("output tokens/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def bars_plot(title: str, values: Mapping[str, float], errors: Mapping[str, float | None]) -> str:
    """One bar for each test, with confidence intervals."""
    if not can_plot():
        return _without_matplotlib()
    figure, [axis] = _figure(1)
    names = list(values)
    axis.barh(names, [values[name] for name in names], xerr=[errors.get(name) or 0 for name in names], height=0.5)
    axis.invert_yaxis()
    axis.set_xlabel(title)
    axis.grid(alpha=0.3, axis="x")
    return _svg(figure)


@dataclass(frozen=True)
class Spot:
    """A configuration in a plot of throughput against latency.

    Attributes:
        label: next to the spot; empty for none.
        front: whether it is on the Pareto front.
        whole: whether it had a full run; others are drawn hollow.
    """

    latency: float
    throughput: float
    label: str = ""
    front: bool = False
    whole: bool = True


def pareto_plot(spots: Sequence[Spot]) -> str:
    """Throughput against mean latency in milliseconds, with the Pareto front as a line."""
    if not can_plot():
        return _without_matplotlib()
    figure, [axis] = _figure(1)
    figure.set_size_inches(10, 4)
    for whole in (False, True):
        part = [spot for spot in spots if spot.whole is whole]
        axis.scatter(
            [spot.latency for spot in part],
            [spot.throughput for spot in part],
            s=28,
            facecolors="tab:blue" if whole else "none",
            edgecolors="tab:blue",
            alpha=1 if whole else 0.5,
            label="whole run" if whole else "shorter run",
        )
    front = sorted((spot.latency, spot.throughput) for spot in spots if spot.front)
    if front:
        ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none"}
        axis.step(*zip(*front, strict=True), where="post", color="tab:orange", label="Pareto front", **ring)
    middle = max((spot.latency for spot in spots), default=0) / 2
    for spot in spots:
        if spot.label:
            left = spot.latency > middle  # the label stays inside the frame
            axis.annotate(
                spot.label,
                (spot.latency, spot.throughput),
                xytext=(-6 if left else 6, 4),
                textcoords="offset points",
                horizontalalignment="right" if left else "left",
                fontsize=8,
            )
    axis.set_xlabel("mean latency of a request, ms")
    axis.set_ylabel("output tokens/s")
    axis.margins(x=0.1, y=0.15)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _spread(record: RequestRecord) -> list[tuple[float, float]]:
    """The pieces of an answer with their tokens; where the server did not tell, an equal share for each."""
    told = sum(tokens for _, tokens in record.pieces)
    if told:
        return [(time, float(tokens)) for time, tokens in record.pieces]
    return [(time, record.output_tokens / len(record.pieces)) for time, _ in record.pieces]


def _without_matplotlib() -> str:
    return "<p>Plots need matplotlib: <code>pip install 'trtqwen[report]'</code></p>"


def _figure(count: int) -> tuple[Figure, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "trtqwen"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]

"""Writes a comparison as JSON, as Markdown and as one HTML page that needs no server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from trtqwen.bench.compare import LOWER_IS_BETTER, Comparison, Side
from trtqwen.bench.figures import Rate
from trtqwen.bench.plots import bars_plot, latency_plot, throughput_plot
from trtqwen.bench.report import facts_table, page, table, with_interval

Table = tuple[str, list[str], list[list[str]]]


def write_comparison(comparison: Comparison, directory: Path, command: str) -> list[Path]:
    """Write `compare.json`, `compare.md` and `compare.html`; returns their paths.

    Args:
        command: that made the comparison.
    """
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "compare.json": json.dumps(comparison.as_json(), indent=2) + "\n",
        "compare.md": comparison_markdown(comparison, command),
        "compare.html": comparison_html(comparison, command),
    }
    for name, text in contents.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in contents]


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """The tables of a comparison: title, header and rows."""
    sides = comparison.sides
    names = [side.contender.name for side in sides]
    for workload in sides[0].figures:
        rows = [
            [f"{metric}, {sides[0].figures[workload].rates[metric].unit}"]
            + [with_interval(side.figures[workload].rates[metric]) for side in sides]
            for metric in ("output_token_throughput", "request_throughput", "success_rate", "early_stop_count")
        ]
        for metric, column in LOWER_IS_BETTER:
            cells = [_percentile(side, workload, metric, column) for side in sides]
            rows.append([f"{metric} {column}, ms", *cells])
        yield f"Workload {workload}", ["", *names], rows
    rows = [
        ["start-up, s", *(_measured(side.startup) for side in sides)],
        ["host memory, GiB", *(_measured(side.host_gib) for side in sides)],
        ["GPU memory of the machine, GiB", *(_measured(side.gpu_gib) for side in sides)],
        ["perplexity of a text", *(_perplexity(side) for side in sides)],
    ]
    for name in names[1:]:
        agreement = comparison.agreements.get(name)
        if agreement is not None:
            first = [place for place in agreement.first_difference if place is not None]
            difference = agreement.log_prob_difference
            equal = f"{agreement.same_answers} of {agreement.answers}"
            rows.append([f"greedy answers equal to {names[0]}'s", *_only(names, name, equal)])
            rows.append(["tokens before the first difference", *_only(names, name, f"{agreement.same_tokens:.1%}")])
            rows.append(["first difference, token", *_only(names, name, ", ".join(map(str, first)) or "none")])
            if difference is not None:
                rows.append(["log probabilities differ by", *_only(names, name, f"{difference:.2g}")])
    yield "Start, memory and answers", ["", *names], rows
    if comparison.losses:
        header = ["who", "where", "what", "value", "best", "times worse"]
        rows = [
            [
                loss.contender,
                loss.where or "always",
                loss.metric,
                f"{loss.value:.4g}",
                f"{loss.best_value:.4g} ({loss.best})",
                f"{loss.factor:.2f}",
            ]
            for loss in comparison.losses
        ]
        yield "Where each one loses", header, rows


def comparison_markdown(comparison: Comparison, command: str) -> str:
    """The comparison for a documentation page."""
    lines = ["# Comparison", "", "    " + command, ""]
    lines += [f"- {fact}: {value}" for fact, value in _facts(comparison).items()]
    for title, header, rows in comparison_tables(comparison):
        lines += ["", f"## {title}", "", _markdown_row(header), _markdown_row(["---"] * len(header))]
        lines += [_markdown_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def comparison_html(comparison: Comparison, command: str) -> str:
    """The comparison as one page, with plots inside."""
    body = [f"<p><code>{command}</code></p>"]
    body += [f'<p class="note">{note}</p>' for note in _notes(comparison)]
    for title, header, rows in comparison_tables(comparison):
        body += [f"<h2>{title}</h2>", table(header, rows)]
        workload = title.removeprefix("Workload ")
        if workload in comparison.sides[0].figures:
            body += [_bars(comparison, workload)]
            tests = {side.contender.name: side.repeats[workload] for side in comparison.sides}
            body += [latency_plot(tests), throughput_plot(tests)]
    return page("Comparison", [*body, facts_table(_facts(comparison))])


def _notes(comparison: Comparison) -> Iterator[str]:
    for side in comparison.sides:
        for workload, found in side.figures.items():
            if found.client.bottleneck:
                yield (
                    f"{side.contender.name}, {workload}: the load generator was the bottleneck: "
                    f"{found.client.bottleneck}."
                )
            for error, count in found.errors.items():
                yield f"{side.contender.name}, {workload}: {count} x {error}"


def _bars(comparison: Comparison, workload: str) -> str:
    rates = {
        side.contender.name: side.figures[workload].rates["output_token_throughput"] for side in comparison.sides
    }
    values = {name: rate.avg for name, rate in rates.items()}
    return bars_plot("output tokens/s", values, {name: rate.ci95 for name, rate in rates.items()})


def _facts(comparison: Comparison) -> dict[str, str]:
    load = comparison.settings.load
    facts = {"load": f"{load.concurrency or load.rate or 'timed'} ({load.mode}), {comparison.settings.turns} turns"}
    facts |= {
        side.contender.name: ", ".join(f"{key} {value}" for key, value in side.about.items() if key != "engine")
        for side in comparison.sides
    }
    facts |= {name: str(value) for name, value in comparison.about.items()}
    for name, digests in comparison.digests.items():
        facts[f"sha256 of {name}"] = " ".join(digest[:12] for digest in digests)
    return facts


def _percentile(side: Side, workload: str, metric: str, column: str) -> str:
    found = side.figures[workload].distributions.get(metric)
    return "-" if found is None else f"{found.percentiles[int(column[1:])]:.4g}"


def _measured(rate: Rate | None) -> str:
    return "-" if rate is None else with_interval(rate)


def _perplexity(side: Side) -> str:
    return "-" if side.answers is None or side.answers.perplexity is None else f"{side.answers.perplexity:.4f}"


def _only(names: Sequence[str], name: str, text: str) -> list[str]:
    return [text if other == name else "" for other in names]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

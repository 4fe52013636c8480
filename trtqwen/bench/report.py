"""Writes a load test as JSON, as CSV and as one HTML page that needs no server."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from trtqwen.bench.figures import Distribution, Figures, Rate
from trtqwen.bench.plots import latency_plot, throughput_plot
from trtqwen.bench.run import BenchReport

_COLUMNS = ("avg", "p50", "p95", "p99", "min", "max")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
svg { width: 100%; height: auto } .note { background: #fff4d6; padding: .5rem 1rem } code { background: #f3f3f3 }
"""


def write_report(report: BenchReport, directory: Path) -> list[Path]:
    """Write `report.json`, `requests.csv`, `figures.csv` and `report.html`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.json": json.dumps(report.as_json(), indent=2) + "\n",
        "figures.csv": figures_csv(report.figures),
        "requests.csv": requests_csv(report),
        "report.html": report_html(report),
    }
    for name, text in contents.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in contents]


def figures_csv(figures: Figures) -> str:
    """One line for each figure."""
    rows = [["metric", "unit", *_COLUMNS, "ci95"]]
    for name, rate in figures.rates.items():
        rows.append([name, rate.unit, _number(rate.avg), *[""] * (len(_COLUMNS) - 1), _number(rate.ci95)])
    for name, distribution in figures.distributions.items():
        rows.append([name, distribution.unit, *_cells(distribution), _number(distribution.avg_ci95)])
    return _csv(rows)


def requests_csv(report: BenchReport) -> str:
    """One line for each request of each repeat; times in seconds since the repeat's first request."""
    header = [
        "repeat",
        "index",
        "due",
        "sent",
        "first",
        "ended",
        "input_tokens",
        "output_tokens",
        "asked_tokens",
        "error",
    ]
    rows = [header]
    for number, records in enumerate(report.repeats, 1):
        start = min(record.sent for record in records)
        for record in records:
            times = [f"{time - start:.6f}" for time in (record.due, record.sent, record.first, record.ended)]
            counts = [str(record.prompt_tokens), str(record.output_tokens), str(record.asked_tokens)]
            rows.append([str(number), str(record.index), *times, *counts, record.error or ""])
    return _csv(rows)


def report_html(report: BenchReport) -> str:
    """The report as one page, with plots inside."""
    tests = {report.target.url: report.repeats}
    settings = report.settings
    load = (
        f"{settings.concurrency} requests at a time"
        if settings.concurrency
        else f"{settings.rate or 'timed'} requests/s"
    )
    facts = {"address": report.target.url, "workload": f"{report.workload}, {load}, {settings.mode}"}
    facts["answers"] = "as long as asked for (ignore_eos)" if report.target.ignore_eos else "until the end token"
    facts |= {name: str(value) for name, value in report.about.items()}
    facts["sha256 of the requests"] = " ".join(digest[:16] for digest in report.digests)
    notes = [report.figures.client.bottleneck] if report.figures.client.bottleneck else []
    notes = [f"The load generator was the bottleneck: {note}. Latencies are upper bounds." for note in notes]
    body = [*[f'<p class="note">{escape(note)}</p>' for note in notes], figures_table(report.figures)]
    body += [latency_plot(tests), throughput_plot(tests), facts_table(facts)]
    return page("Load test", body)


def page(title: str, body: Iterable[str]) -> str:
    """An HTML page that needs nothing but itself."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    content = f"<h1>{escape(title)}</h1>{''.join(body)}"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{content}</body></html>\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of texts."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def facts_table(facts: dict[str, str]) -> str:
    """Return the HTML table of where something was measured."""
    return table(("measured on", ""), facts.items())


def figures_table(figures: Figures) -> str:
    """Return the HTML tables of rates and of distributions."""
    rates = [[name, rate.unit, with_interval(rate)] for name, rate in figures.rates.items()]
    values = [
        [name, distribution.unit, *_cells(distribution)] for name, distribution in figures.distributions.items()
    ]
    return table(("figure", "unit", "mean ± 95 %"), rates) + table(("figure", "unit", *_COLUMNS), values)


def with_interval(rate: Rate) -> str:
    """`812 ± 14`."""
    return _number(rate.avg) if not rate.ci95 else f"{_number(rate.avg)} ± {_number(rate.ci95)}"


def _cells(distribution: Distribution) -> list[str]:
    values = distribution.as_json()
    return [_number(values[column]) for column in _COLUMNS]


def _number(value: object) -> str:
    return (
        f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else "" if value is None else f"{value:.0f}"
    )


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

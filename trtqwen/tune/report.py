"""Writes a search: the table as CSV and JSON, one page with the plot, and the tuned recipe."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import wrap

from trtqwen.artifact.directory import write_file
from trtqwen.bench.plots import Spot, pareto_plot
from trtqwen.bench.report import facts_table, page, table
from trtqwen.recipe import find_recipe
from trtqwen.tune.search import Row, Search
from trtqwen.yaml_file import parse_value, with_fields

HEADER = (
    "configuration",
    "mean latency, ms",
    "throughput, tokens/s",
    "success rate",
    "time to first token, ms",
    "time between tokens, ms",
    "requests",
    "state",
)
_WIDTH = 116


def write_search(search: Search, directory: Path) -> list[Path]:
    """Write `tune.csv`, `tune.json` and `tune.html`; returns their paths."""
    contents = {
        "tune.csv": search_csv(search),
        "tune.json": json.dumps(search.as_json(), indent=2) + "\n",
        "tune.html": search_html(search),
    }
    for name, text in contents.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in contents]


def write_recipe(search: Search, source: str, path: Path, extra: Sequence[str] = ()) -> Path:
    """Write the tuned recipe: the recipe's file with new values and a header with their origin.

    Args:
        source: name or file of the recipe.
        extra: changes of the command line, `section.field=value`, which the search began with.
    """
    assert search.best is not None
    assert search.best.measures is not None
    best, own = search.best.measures, search.own.measures
    percentile = search.target.percentile
    where = f"{search.about['on']}, workload {search.about['workload']}, {search.about['load']}"
    lines = [
        f"Tuned from {search.recipe.name} by `trtqwen tune`, {where}: {best.throughput:,.0f} output tokens/s, "
        f"mean latency {best.mean_latency:,.0f} ms, {percentile}th percentile of the time to first token "
        f"{best.time_to_first_token:,.0f} ms and of the time between tokens {best.inter_token_latency:,.1f} ms, "
        f"in {search.runs} runs."
    ]
    if search.best is search.own:
        lines.append("No other configuration was better than the recipe itself.")
    elif own is not None:
        lines.append(
            f"{search.recipe.name} itself gave {own.throughput:,.0f} tokens/s and {own.mean_latency:,.0f} ms there. "
            f"Changed: {search.best.title}."
        )
    if search.about["on"] == "on the simulator":
        lines.append("These figures are forecasts. Measure the recipe before you rely on them.")
    lines.append(f"What follows is {search.recipe.name}; figures in its comments are those of its own values.")
    head = "".join(f"# {line}\n" for text in lines for line in wrap(text, _WIDTH))
    changes = {**_given(extra), **search.best.changes}
    changed = {
        name: value
        for name, value in changes.items()
        if name in _given(extra) or search.own.changes.get(name) != value
    }
    text = with_fields(find_recipe(source).read_text(encoding="utf-8"), changed)
    write_file(path, f"{head}#\n{text}")
    return path


def search_table(search: Search) -> list[tuple[str, ...]]:
    """A line for each configuration, under `HEADER`."""
    return [_cells(row) for row in search.rows]


def search_csv(search: Search) -> str:
    """The table with every changed field in a column of its own."""
    fields = list(search.own.changes)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADER, "cause", *fields])
    for row in search.rows:
        writer.writerow([*_cells(row), row.cause or "; ".join(row.misses), *(row.changes[name] for name in fields)])
    return text.getvalue()


def search_html(search: Search) -> str:
    """The search as one page."""
    spots = [
        Spot(
            latency=row.measures.mean_latency,
            throughput=row.measures.throughput,
            label=_label(search, row),
            front=row.front,
            whole=row.whole,
        )
        for row in search.rows
        if row.measures is not None
    ]
    target = search.target
    limits = {
        "time to first token": target.time_to_first_token,
        "time between tokens": target.inter_token_latency,
    }
    facts = {"recipe": search.recipe.name, "where": search.about["on"], "workload": search.about["workload"]}
    facts |= {"load": search.about["load"], "sha256 of the requests": search.about["sha256"][:16]}
    facts |= {
        f"limit of the {name}": f"{limit:g} ms, {target.percentile}th percentile"
        for name, limit in limits.items()
        if limit is not None
    }
    facts["runs"] = f"{search.runs}, as long as {search.whole_runs:.1f} whole ones"
    causes = [(row.title, row.cause) for row in search.rows if row.cause]
    body = [pareto_plot(spots), table(HEADER, search_table(search))]
    if causes:
        body += ["<h2>Failed and pruned</h2>", table(("configuration", "cause"), causes)]
    note = "These figures are forecasts." if search.about["on"] == "on the simulator" else ""
    head = [f'<p class="note">{escape(note)}</p>'] if note else []
    return page(f"Tuning of {search.recipe.name}", [*head, *body, facts_table(facts)])


def _label(search: Search, row: Row) -> str:
    if row is search.best:
        return row.title
    return "the recipe" if row is search.own else ""


def _cells(row: Row) -> tuple[str, ...]:
    found = row.measures
    if found is None:
        return (row.title, "", "", "", "", "", str(row.requests or ""), row.state)
    return (
        row.title,
        f"{found.mean_latency:.1f}",
        f"{found.throughput:.1f}",
        f"{found.success_rate:.1%}",
        f"{found.time_to_first_token:.1f}",
        f"{found.inter_token_latency:.2f}",
        str(row.requests),
        row.state,
    )


def _given(extra: Sequence[str]) -> dict[str, object]:
    """The values of `section.field=value` texts."""
    pairs = (text.partition("=") for text in extra)
    return {name.strip(): parse_value(value) for name, _, value in pairs}

"""`trtqwen compare`: several servers under the same loads."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as RichTable

from trtqwen.artifact.directory import make_directory
from trtqwen.bench.compare import CompareSettings, comparison_digest, run_compare
from trtqwen.bench.compare_report import Table, comparison_tables, write_comparison
from trtqwen.bench.contender import find_contender, find_vocabulary
from trtqwen.bench.run import LoadSettings
from trtqwen.bench.setup import WorkloadOptions
from trtqwen.bench.visits import Visits
from trtqwen.cli.bench import Concurrency, InputTokens, OutputTokens, PrefixTokens, RequestRate, Requests, Seed
from trtqwen.cli.output import Json, print_json, stderr, stdout
from trtqwen.diagnostics import InputError
from trtqwen.system.leftovers import workspace


def command(
    contenders: Annotated[
        list[str],
        typer.Argument(
            help="Compare these, two or more: a built recipe, a model repository, or an address. NAME=... names one."
        ),
    ],
    workload: Annotated[
        list[str] | None,
        typer.Option(metavar="WORKLOAD", help="Name a workload or a file. Repeat it for more. [default: chat]"),
    ] = None,
    concurrency: Concurrency = None,
    rate: RequestRate = None,
    requests: Requests = 100,
    turns: Annotated[
        int, typer.Option(min=3, help="Start and measure each contender this many times, alternating.")
    ] = 3,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Send this many requests before each run. [default: the concurrency]")
    ] = None,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = None,
    prefix_tokens: PrefixTokens = None,
    answer_tokens: Annotated[
        int, typer.Option(min=0, help="Compare greedy answers of this length; 0 leaves them out.")
    ] = 32,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Read the tokenizer from here. [default: the first local engine's]")
    ] = None,
    repositories: Annotated[Path, typer.Option(help="Look for a recipe's repository here.")] = Path("triton_repo"),
    processes: Annotated[int, typer.Option(min=1, help="Send from this many processes.")] = 1,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="Write compare.json, compare.md and compare.html here.")] = Path(
        "compare"
    ),
    json: Json = False,
) -> None:
    """Compare servers: start-up time, throughput, latency, memory, success rate, and whether the answers agree.

    The command starts and stops recipes and repositories, one at a time, alternating. It sends requests to an address
    and starts nothing there. All contenders get the same requests. The answers of the others are compared with those
    of the first one. If a comparison is interrupted, run the command again to resume it.
    """
    if len(contenders) < 2:
        raise InputError("a comparison needs at least two contenders", "name another one, or use `trtqwen bench`")
    found = [find_contender(text, repositories) for text in contenders]
    names = [contender.name for contender in found]
    if len(set(names)) < len(names):
        raise InputError(f"two contenders are called {max(names, key=names.count)}", "name them as NAME=...")
    places = None if rate is not None else concurrency or 16
    warm = (places or 16) if warmup is None else warmup
    load = LoadSettings(places, rate, turns, warm, processes, seed)
    lengths = (input_tokens, output_tokens, prefix_tokens)
    workloads = tuple(WorkloadOptions(name, requests, *lengths, rate, seed) for name in workload or ["chat"])
    settings = CompareSettings(workloads, load, turns, answer_tokens, 48 if answer_tokens else 0)
    tokens, config = find_vocabulary(found, tokenizer)
    with workspace("compare") as logs, stderr.status("preparing") as status:

        def show(step: str) -> None:
            status.update(step)
            if not stderr.is_terminal:
                stderr.print(step, markup=False, highlight=False, soft_wrap=True)

        make_directory(output)
        with closing(Visits(output, comparison_digest(found, settings, tokenizer))) as visits:
            comparison = run_compare(found, tokens, config, settings, logs, visits, show)
            written = write_comparison(comparison, output, shlex.join(["trtqwen", *sys.argv[1:]]))
            visits.remove()
    if json:
        print_json(comparison.as_json())
    else:
        _print(comparison_tables(comparison))
    for path in written:
        stderr.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _print(tables: Iterator[Table]) -> None:
    for title, header, rows in tables:
        shown = RichTable(*header, title=title, title_justify="left", box=None)
        for row in rows:
            shown.add_row(*row)
        stdout.print(shown, highlight=False)

"""`trtqwen tune`: a search for the best batching parameters."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trtqwen.bench.setup import WorkloadOptions
from trtqwen.cli.bench import (
    Concurrency,
    InputTokens,
    OutputTokens,
    PrefixTokens,
    RequestRate,
    Seed,
    WorkloadName,
)
from trtqwen.cli.output import Bars, Changes, Force, Json, print_json, progress_bars, stderr, stdout
from trtqwen.tune.report import search_table, write_recipe, write_search
from trtqwen.tune.search import OnProgress, Progress, Search, SearchSettings, TargetMissed
from trtqwen.tune.setup import PLACES, TuneOptions, make_searcher
from trtqwen.tune.target import Target, milliseconds

_SHOWN = 12  # rows of the table in the terminal


class On(str, Enum):
    """The place where configurations are measured."""

    engine = "engine"
    simulator = "simulator"


def command(
    recipe: Annotated[str, typer.Argument(help="Use this recipe: a bundled name, or a YAML file.")],
    output: Annotated[
        Path, typer.Option(help="Write tables, plot, tuned recipe and the state of the search to this directory.")
    ],
    on: Annotated[
        On, typer.Option(help="Measure on an engine of this machine, or forecast on the simulator.")
    ] = On.engine,
    model: Annotated[Path | None, typer.Option(help="Build engines from this Hugging Face model directory.")] = None,
    workload: WorkloadName = "chat",
    concurrency: Concurrency = None,
    rate: RequestRate = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Set the number of requests of a full run. [default: 18 x concurrency]")
    ] = None,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = None,
    prefix_tokens: PrefixTokens = None,
    time_to_first_token: Annotated[
        str | None, typer.Option(metavar="TIME", help="Limit the time to first token: 500ms, 0.5s.")
    ] = None,
    inter_token_latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Limit the mean time between tokens of a request: 40ms.")
    ] = None,
    percentile: Annotated[
        str, typer.Option(help="Apply the limits to this percentile of the requests: 50, 75, 90, 95 or 99.")
    ] = "95",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE,...",
            help="Sweep this field over these values: engine.max_batch_size=16,32 or layout=TP4x1,TP1x4. Repeat it "
            "for more. [default: every batching parameter, around the recipe's values]",
        ),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Run this many configurations.")] = 27,
    served: Annotated[
        bool, typer.Option("--served", help="Measure through Triton, even if the engine can run alone.")
    ] = False,
    seed: Seed = 0,
    changes: Changes = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Find the configuration with the highest throughput within the latency limits.

    Every candidate gets a short run. The best third gets a run three times as long, and the best third of those gets
    a full run. The table also lists candidates that do not build or start, with the cause. Invalid combinations get
    no run. If a search is interrupted, run the command again to resume it.

    Exit code 1 if no configuration is within the limits.
    """
    if percentile not in ("50", "75", "90", "95", "99"):
        raise typer.BadParameter(f"{percentile!r} is not one of 50, 75, 90, 95, 99", param_hint="--percentile")
    target = Target(
        time_to_first_token=None if time_to_first_token is None else milliseconds(time_to_first_token),
        inter_token_latency=None if inter_token_latency is None else milliseconds(inter_token_latency),
        percentile=int(percentile),
    )
    places = None if rate is not None else concurrency
    whole = requests or 18 * (places or PLACES)
    options = TuneOptions(
        recipe=recipe,
        changes=tuple(changes or ()),
        sweeps=tuple(sweep or ()),
        on=on.value,
        workload=WorkloadOptions(workload, whole, input_tokens, output_tokens, prefix_tokens, rate, seed),
        concurrency=places,
        target=target,
        search=SearchSettings(candidates, whole, seed=seed),
        model=model,
        output=output,
        served=served,
    )
    with progress_bars() as bars:
        search = make_searcher(options, _progress(bars), force=force).run()
    written = write_search(search, output)
    if search.best is not None:
        written.append(write_recipe(search, recipe, output / f"{search.recipe.name}-tuned.yaml", options.changes))
    for path in written:
        stderr.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if not json:
        _print(search)
        search.check()
        return
    try:
        search.check()
    except TargetMissed as problem:  # still one object
        print_json({**search.as_json(), "error": problem.diagnostic.as_json()})
        for line in (f"error: {problem.what}", f"hint: {problem.hint}"):
            stderr.print(line, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(problem.exit_code) from None
    print_json(search.as_json())


def _progress(bars: Bars) -> OnProgress:
    """Show a bar with the best result so far on a terminal, and a line for each run elsewhere."""
    shown: list[object] = []

    def show(progress: Progress) -> None:
        title, measures = progress.best or ("", None)
        best = f"best {measures.throughput:,.0f} tokens/s: {title}" if measures else ""
        if stderr.is_terminal:
            if not shown:
                shown.append(bars.noted("tuning", progress.total, unit="runs"))
            advance = shown[0]
            assert callable(advance)
            advance(best)
            return
        found = progress.trial.measures
        result = f"{found.throughput:,.1f} tokens/s" if found else f"failed: {progress.trial.cause}"
        notes = ", kept from before" * progress.reused + ", the best so far" * (title == progress.title)
        line = f"run {progress.done}, {progress.trial.requests} requests, {progress.title}: {result}{notes}"
        stderr.print(line, markup=False, highlight=False, soft_wrap=True)

    return show


def _print(search: Search) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("configuration", overflow="fold")
    for name in ("mean ms", "tokens/s", "success", "first ms", "gap ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    lines = search_table(search)
    for *cells, _, state in lines[:_SHOWN]:
        table.add_row(*cells, state)
    stdout.print(table, highlight=False)
    if len(lines) > _SHOWN:
        stdout.print(f"and {len(lines) - _SHOWN} more in tune.csv", style="dim", highlight=False)
    runs = f"{search.runs} runs, as long as {search.whole_runs:.1f} whole ones, over {search.space:,} combinations"
    stdout.print(f"{runs}; {search.about['on']}, {search.about['workload']}, {search.about['load']}", highlight=False)

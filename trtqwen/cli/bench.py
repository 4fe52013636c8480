"""`trtqwen bench`: a load test of a running server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from trtqwen.bench.figures import Figures, Goodput
from trtqwen.bench.report import with_interval, write_report
from trtqwen.bench.roofline import bound
from trtqwen.bench.run import BenchReport, LoadSettings, check_settings, probe, run_bench
from trtqwen.bench.setup import WorkloadOptions, find_tokenizer, make_workloads
from trtqwen.cli.output import Json, print_json, progress_bars, stderr, stdout
from trtqwen.plan.plan import model_config
from trtqwen.recipe import load_recipe

Concurrency = Annotated[
    int | None, typer.Option("--concurrency", min=1, help="Keep this many requests open (closed loop). [default: 16]")
]
RequestRate = Annotated[
    float | None, typer.Option("--rate", min=0.001, help="Send this many requests per second (open loop, Poisson).")
]
Requests = Annotated[int, typer.Option("--requests", min=1, help="Set the number of requests of each repeat.")]
Repeats = Annotated[int, typer.Option("--repeats", min=3, help="Set the number of measured repeats.")]
WorkloadName = Annotated[
    str,
    typer.Option(
        "--workload",
        help="Name a workload (smoke, chat, rag, generation, shared-prefix) or a file: ShareGPT, Mooncake or JSONL.",
    ),
]
InputTokens = Annotated[int | None, typer.Option(min=1, help="Fix the length of the prompts of a named workload.")]
OutputTokens = Annotated[int | None, typer.Option(min=1, help="Fix the length of the answers of a named workload.")]
PrefixTokens = Annotated[int | None, typer.Option(min=0, help="Let the prompts share this many tokens at the start.")]
GoodputLimits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIMIT:MS",
        help="Count requests within a limit in ms: time_to_first_token:N, inter_token_latency:N or "
        "request_latency:N. Repeat it for more.",
    ),
]
Seed = Annotated[int, typer.Option(help="Set the seed of prompts and arrivals.")]


def command(
    url: Annotated[
        str,
        typer.Argument(help="Measure the server at this address: `host:port` for gRPC, `http://host:port` for HTTP."),
    ],
    workload: WorkloadName = "chat",
    concurrency: Concurrency = None,
    rate: RequestRate = None,
    requests: Requests = 100,
    repeats: Repeats = 3,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Send this many requests first, unmeasured. [default: the concurrency]")
    ] = None,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = None,
    prefix_tokens: PrefixTokens = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Read the tokenizer from here. [default: the engine's, where it is local]")
    ] = None,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Let answers end at the end token instead of at their full length.")
    ] = False,
    goodput: GoodputLimits = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Name the recipe that is served. The report records it and compares with its roofline."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Read the model's sizes for the roofline from this directory.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name the model as the server calls it.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRTQWEN_API_KEY", help="Send this key to HTTP servers.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Send from this many processes.")] = 1,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option(help="Write report.json, report.html and CSV files to this directory.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure throughput and latency of a running server under load.

    A closed loop keeps --concurrency requests open; an open loop sends --rate requests per second at times that are
    drawn before the test. Answers have the length that the workload asks for unless --stop-at-eos is given. Tokens
    are counted from ids. Latencies count from the moment a request is due.
    """
    limits = parse_goodput(goodput or [])
    places = None if rate is not None else concurrency
    target, about = probe(url, model_name, api_key)
    options = WorkloadOptions(workload, requests, input_tokens, output_tokens, prefix_tokens, rate, seed)
    first, *others = make_workloads(options, find_tokenizer(tokenizer, about), repeats + 1)
    if places is None and rate is None and not first.timed:
        places = 16
    settings = LoadSettings(places, rate, repeats, places or 16 if warmup is None else warmup, processes, seed)
    check_settings(settings, first)
    target = replace(target, ignore_eos=not stop_at_eos)
    limit = None
    if recipe is not None:
        loaded = load_recipe(recipe)
        about["recipe"] = loaded.model_dump(mode="json", exclude_none=True)
        if loaded.host is not None:
            limit = bound(
                model_config(loaded, model),
                loaded.checkpoint,
                loaded.host.card,
                replicas=loaded.serve.replicas,
                concurrency=places,
            )
    with progress_bars() as bars:

        def phase(title: str, total: int) -> Callable[[int, int], None]:
            advance = bars.add(title, total, unit="requests")
            return lambda done, tokens: advance(done)

        report = run_bench(
            target,
            others,
            replace(first, asks=first.asks[: settings.warmup]),
            settings,
            goodput=limits,
            bound=limit,
            about=about,
            on_phase=phase,
        )
    written = write_report(report, output) if output else []
    if json:
        print_json(report.as_json())
    else:
        print_figures(report)
    for path in written:
        stderr.print(f"wrote {path}", highlight=False, soft_wrap=True)


def parse_goodput(limits: list[str]) -> Goodput | None:
    """Limits such as `time_to_first_token:500`.

    Raises:
        typer.BadParameter: naming the limit that is not one.
    """
    known = tuple(Goodput.__dataclass_fields__)
    values: dict[str, float] = {}
    for text in limits:
        name, _, number = text.partition(":")
        if name not in known:
            raise typer.BadParameter(f"{text!r} is not NAME:MILLISECONDS with one of {', '.join(known)}")
        try:
            values[name] = float(number)
        except ValueError:
            raise typer.BadParameter(f"{number!r} in {text!r} is not a number of milliseconds") from None
    return Goodput(**values) if values else None


def print_figures(report: BenchReport) -> None:
    """Print the figures of a report, and what limits its trust."""
    settings = report.settings
    load = f"{settings.concurrency} open" if settings.concurrency else f"{settings.rate or 'timed'}/s"
    stdout.print(
        f"{report.target.url}: {report.workload}, {load}, {settings.repeats} repeats", markup=False, highlight=False
    )
    print_table(report.figures)
    if report.bound is not None:
        share = report.figures.rates["output_token_throughput"].avg / report.bound.rate
        stdout.print(f"roofline {report.bound.rate:,.0f} output tokens/s, reached {share:.0%}", highlight=False)
    else:
        stdout.print("roofline unknown: --recipe names no card", style="dim", highlight=False)
    for error, count in report.figures.errors.items():
        stdout.print(f"{count} x {error}", style="yellow", markup=False, highlight=False)
    if report.figures.client.bottleneck:
        note = f"the load generator was the bottleneck: {report.figures.client.bottleneck}; add --processes"
        stdout.print(note, style="yellow", markup=False, highlight=False)


def print_table(figures: Figures) -> None:
    """The rates, then the distributions."""
    from rich.table import Table

    rates = Table("figure", "unit", "mean ± 95 %", box=None)
    for name, rate in figures.rates.items():
        rates.add_row(name, rate.unit, with_interval(rate))
    columns = ("avg", "p50", "p95", "p99")
    values = Table("latency and length", "unit", *columns, box=None)
    for name, distribution in figures.distributions.items():
        row: dict[str, Any] = distribution.as_json()
        values.add_row(name, distribution.unit, *(f"{row[column]:.1f}" for column in columns))
    stdout.print(rates, highlight=False)
    stdout.print(values, highlight=False)

"""`trtqwen simulate`: a load test without a server and without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from trtqwen.bench.setup import WorkloadOptions
from trtqwen.cli.bench import (
    Concurrency,
    GoodputLimits,
    InputTokens,
    OutputTokens,
    PrefixTokens,
    RequestRate,
    Requests,
    Seed,
    WorkloadName,
    parse_goodput,
    print_table,
)
from trtqwen.cli.output import Changes, Json, print_json, progress_bars, stdout
from trtqwen.recipe import load_recipe
from trtqwen.simulate.deployment import deploy
from trtqwen.simulate.run import Load, Simulation, run_simulation, simulated_workloads


def command(
    recipe: Annotated[str, typer.Argument(help="Use this recipe: a bundled name, or a YAML file.")],
    workload: WorkloadName = "chat",
    concurrency: Concurrency = None,
    rate: RequestRate = None,
    requests: Requests = 100,
    repeats: Annotated[int, typer.Option(min=1, help="Set the number of repeats, each with its own prompts.")] = 1,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = None,
    prefix_tokens: PrefixTokens = None,
    served: Annotated[
        bool,
        typer.Option("--served", help="Include the server process between engine and clients (backend vllm only)."),
    ] = False,
    goodput: GoodputLimits = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Read sizes and tokenizer from this Hugging Face directory. [default: the recipe's model]"),
    ] = None,
    seed: Seed = 0,
    changes: Changes = None,
    json: Json = False,
) -> None:
    """Forecast throughput and latency of a recipe under a workload.

    The scheduler and the KV cache accounting of the embedded engine run on a virtual clock. A cost model of the card
    gives the time of each step. The figures have the same names as in `bench`. The bound is the fastest result that
    the card's data sheet allows for the same steps.
    """
    limits = parse_goodput(goodput or [])
    deployment = deploy(load_recipe(recipe, changes or ()), model)
    options = WorkloadOptions(workload, requests, input_tokens, output_tokens, prefix_tokens, rate, seed)
    workloads = simulated_workloads(options, deployment, model, repeats)
    places = None if rate is not None else concurrency
    if places is None and not workloads[0].timed:
        places = 16
    with progress_bars() as bars:

        def repeat(title: str, total: int) -> Callable[[int], None]:
            return bars.add(title, total, unit="requests")

        simulation = run_simulation(deployment, workloads, Load(places, served), goodput=limits, on_repeat=repeat)
    if json:
        print_json(simulation.as_json())
    else:
        _print(simulation)


def _print(simulation: Simulation) -> None:
    recipe, bound, load = simulation.deployment.recipe, simulation.bound, simulation.load
    assert recipe.host is not None
    rate = simulation.figures.rates["output_token_throughput"].avg
    open_requests = f"{load.concurrency} open" if load.concurrency else "timed"
    lines = [
        f"{recipe.name} on {recipe.host.card}: {simulation.workloads[0].name}, {open_requests}, forecast",
        f"bound     {bound.output_token_throughput:,.0f} output tokens/s, limited by {bound.limit}",
        f"forecast  {rate:,.0f} output tokens/s, {rate / bound.output_token_throughput:.0%} of the bound",
        f"schedule  {simulation.steps:,} steps, at most {simulation.fullest} requests in one, "
        f"{simulation.paused} pauses, {simulation.reused_blocks:,} KV cache blocks reused",
    ]
    for line in lines:
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    print_table(simulation.figures)
    for error, count in simulation.figures.errors.items():
        stdout.print(f"{count} x {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for note in simulation.notes:
        stdout.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)

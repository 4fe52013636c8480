"""The searcher for the options of a command: recipe, space, workload and bench."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trtqwen.artifact.directory import make_directory
from trtqwen.bench.setup import WorkloadOptions, make_workloads
from trtqwen.bench.workload import Workload
from trtqwen.diagnostics import InputError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import Recipe, load_recipe, recipe_content
from trtqwen.simulate.deployment import deploy
from trtqwen.simulate.run import Load, simulated_workloads
from trtqwen.tune.bench import Bench, EngineBench, ServerBench, SimulatorBench, needs_servers
from trtqwen.tune.halving import budgets
from trtqwen.tune.search import OnProgress, Searcher, SearchSettings, search_digest
from trtqwen.tune.space import LAYOUT, default_space, parse_space
from trtqwen.tune.target import Target
from trtqwen.tune.trials import Trials

On = Literal["engine", "simulator"]
PLACES = 16  # requests open at a time, where neither the user nor the workload says


@dataclass(frozen=True)
class TuneOptions:
    """Options of a search.

    Attributes:
        recipe: name or file.
        changes: of its fields, before the search begins.
        sweeps: `FIELD=VALUE,VALUE`; empty sweeps every field that matters.
        concurrency: requests open at a time; None sends them at their times, or `PLACES` at a time if they have none.
        model: Hugging Face directory; needed on an engine.
        served: measure through Triton, even if the engine can run alone.
    """

    recipe: str
    changes: tuple[str, ...]
    sweeps: tuple[str, ...]
    on: On
    workload: WorkloadOptions
    concurrency: int | None
    target: Target
    search: SearchSettings
    model: Path | None
    output: Path
    served: bool = False


def make_searcher(options: TuneOptions, on_progress: OnProgress, *, force: bool = False) -> Searcher:
    """Make the searcher.

    Raises:
        InputError: if recipe, workload or sweep is wrong, or the model is missing.
        OutputError: if the output holds another search and `force` is not set.
    """
    recipe = load_recipe(options.recipe, options.changes)
    content = recipe_content(options.recipe, options.changes)
    space = parse_space(recipe, options.sweeps) if options.sweeps else default_space(recipe)
    servers = options.served or needs_servers(recipe, LAYOUT in space and recipe.engine.backend != "torch")
    measured, warmup = _workloads(options, recipe)
    if options.concurrency is None and not measured.timed:
        options = replace(options, concurrency=PLACES)
    # A file may hold fewer requests than a whole run was to have.
    options = replace(options, search=replace(options.search, requests=len(measured.asks)))
    shortest = budgets(options.search.requests, options.search.rungs, options.search.factor)[0]
    if shortest < (options.concurrency or 1):
        least = (options.concurrency or 1) * options.search.factor ** (options.search.rungs - 1)
        raise InputError(
            f"--requests {options.search.requests}: the shortest runs have {shortest} requests, and never have "
            f"{options.concurrency} of them open",
            f"pass at least --requests {least}, or a lower --concurrency",
        )
    load = Load(options.concurrency)
    about = _about(options, measured, servers=servers)
    digest = search_digest(content, space, options.target, options.search, {**about, "model": str(options.model)})
    make_directory(options.output)
    trials = Trials(options.output, digest, force=force)
    bench: Bench
    if options.on == "simulator":
        bench = SimulatorBench(measured, load, options.model)
    else:
        assert options.model is not None
        home = options.output / "engines"
        kind = ServerBench if servers else EngineBench
        bench = kind(measured, warmup, load, options.model, home)
    return Searcher(
        recipe,
        content,
        space,
        options.target,
        options.search,
        bench,
        trials,
        model=options.model,
        about=about,
        on_progress=on_progress,
    )


def _workloads(options: TuneOptions, recipe: Recipe) -> tuple[Workload, Workload]:
    """Return the requests of a full run, and those for the warm-up."""
    if options.on == "simulator":
        made = simulated_workloads(options.workload, deploy(recipe, options.model), options.model, 2)
    elif options.model is None:
        raise InputError("an engine needs the model that it is built from", "pass --model, or --on simulator")
    else:
        made = make_workloads(options.workload, Tokenizer(options.model), 2)
    measured, other = made
    places = options.concurrency or PLACES
    return measured, replace(other, asks=other.asks[:places])


def _about(options: TuneOptions, workload: Workload, *, servers: bool) -> dict[str, Any]:
    where = {"simulator": "on the simulator", "engine": "behind Triton" if servers else "on the engine alone"}
    load = f"{options.workload.rate} requests/s" if options.workload.rate else "at the times of the workload"
    if options.concurrency:
        load = f"{options.concurrency} requests open"
    return {"on": where[options.on], "workload": workload.name, "load": load, "sha256": workload.digest}

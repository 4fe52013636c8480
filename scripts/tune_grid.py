"""Compares `trtqwen tune` with an exhaustive grid: python scripts/tune_grid.py --output DIR

Both search the same 27 configurations of the bundled model on this machine's CPU. The grid gives each of them a whole
run; tune's runs are together as long as 9 whole ones. Then the engines of the two winners and of the recipe answer
short bursts alternately, so that what else the machine does hits all of them alike. Prints a Markdown table. A second
start resumes the first one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from trtqwen.bench.setup import WorkloadOptions, make_workloads
from trtqwen.demo import MODEL
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import Recipe, load_recipe, recipe_content
from trtqwen.simulate.run import Load
from trtqwen.tune.bench import EngineBench
from trtqwen.tune.report import write_search
from trtqwen.tune.search import Progress, Searcher, SearchSettings, search_digest
from trtqwen.tune.space import Configuration, configurations, own_configuration, parse_space
from trtqwen.tune.target import Target
from trtqwen.tune.trials import Trial, Trials

RECIPE = "qwen2-tiny-cpu"
CHANGES = ("checkpoint.tp_size=1", "engine.max_batch_size=4")
SWEEPS = (
    "engine.max_batch_size=2,4,16",
    "engine.max_num_tokens=64,256,512",
    "serve.max_tokens_in_paged_kv_cache=1024,2048,8192",
)
_BURST = 2  # requests of each place in a burst


def main() -> None:
    """Run both searches and print who wins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for engines and results")
    parser.add_argument("--workload", default="smoke")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=288, help="of a whole run")
    parser.add_argument("--turns", type=int, default=24, help="short runs of each winner at the end, alternating")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    recipe, content = load_recipe(RECIPE, CHANGES), recipe_content(RECIPE, CHANGES)
    space = parse_space(recipe, SWEEPS)
    workload = WorkloadOptions(options.workload, options.requests)
    measured, other = make_workloads(workload, Tokenizer(MODEL), 2)
    warmup = replace(other, asks=other.asks[: options.concurrency])
    bench = EngineBench(measured, warmup, Load(options.concurrency), MODEL, options.output / "engines")
    target, settings = Target(), SearchSettings(candidates=27, requests=options.requests)
    load = f"{options.concurrency} requests open"
    about = {"on": "on the engine alone", "workload": options.workload, "load": load, "sha256": measured.digest}

    search_base = own_configuration(recipe, space)
    trials = Trials(options.output, search_digest(content, space, target, settings, about))
    search = Searcher(
        recipe, content, space, target, settings, bench, trials, model=MODEL, about=about, on_progress=_say
    ).run()
    write_search(search, options.output)
    assert search.best is not None

    grid: dict[Configuration, float] = {}
    recipes: dict[Configuration, Recipe] = {}
    (options.output / "grid").mkdir(exist_ok=True)
    runs = Trials(options.output / "grid", measured.digest)
    for configuration in configurations(recipe, space, seed=0):
        recipes[configuration] = Recipe.model_validate({**configuration.apply(content), "name": RECIPE})
        trial = runs.find(configuration.changes, options.requests)
        if trial is None:
            begun = time.monotonic()
            found = target.measures(bench.run(recipes[configuration], options.requests))
            trial = Trial(configuration.changes, options.requests, time.monotonic() - begun, found)
            runs.add(trial)
        assert trial.measures is not None
        grid[configuration] = trial.measures.throughput
        print(
            f"grid {len(grid)}, {configuration.title(search_base)}: {grid[configuration]:,.0f} tokens/s", flush=True
        )
    tuned_seconds = sum(trial.seconds for trial in trials.trials)
    grid_seconds = sum(trial.seconds for trial in runs.trials)
    best = max(grid, key=lambda one: grid[one])
    tuned = next(one for one in grid if one.changes == search.best.changes)

    own = search_base
    again: dict[Configuration, list[float]] = {one: [] for one in (tuned, best, own)}
    with ExitStack() as stack:
        engines = {one: stack.enter_context(bench.opened(recipes[one])) for one in again}
        for _ in range(options.turns):
            for one, rates in again.items():
                burst = bench.measure(engines[one], _BURST * options.concurrency)
                rates.append(burst.rates["output_token_throughput"].avg)
    ratios = [mine / theirs for mine, theirs in zip(again[tuned], again[best], strict=True)]
    result = {
        "combinations": len(grid),
        "whole_runs": {"tune": search.whole_runs, "grid": len(grid)},
        "seconds": {"tune": tuned_seconds, "grid": grid_seconds},
        "tuned": {"configuration": tuned.title(own), "tokens_per_s": again[tuned]},
        "grid_best": {"configuration": best.title(own), "tokens_per_s": again[best]},
        "recipe": again[own],
        "ratio": statistics.median(ratios),
    }
    (options.output / "grid.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n| | configuration | whole runs | seconds | tokens/s, median |\n| --- | --- | --- | --- | --- |")
    for name, one, length, seconds in (
        ("tune", tuned, search.whole_runs, tuned_seconds),
        ("grid", best, float(len(grid)), grid_seconds),
        ("recipe", own, 0.0, 0.0),
    ):
        rate = statistics.median(again[one])
        print(f"| {name} | {one.title(own)} | {length:.1f} | {seconds:.0f} | {rate:,.0f} |")
    print(f"\ntune's winner by the grid's: {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _say(progress: Progress) -> None:
    found = progress.trial.measures
    rate = f"{found.throughput:,.0f} tokens/s" if found else progress.trial.cause
    print(f"tune {progress.done}, {progress.trial.requests} requests, {progress.title}: {rate}", flush=True)


if __name__ == "__main__":
    main()

"""Holds `trtqwen tune` against an exhaustive grid: python scripts/tune_grid.py --output DIR

Both search the same 27 configurations of the bundled model on this machine's CPU. The grid gives each of them a whole
run; tune's runs are together as long as 9 whole ones. Then the two winners and the recipe itself run alternately,
so that noise does not decide. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from trtqwen.bench.setup import WorkloadOptions, make_workloads
from trtqwen.demo import MODEL
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import Recipe, load_recipe, recipe_content
from trtqwen.simulate.run import Load
from trtqwen.tune.bench import Bench, EngineBench
from trtqwen.tune.journal import Journal
from trtqwen.tune.report import write_search
from trtqwen.tune.search import Progress, Searcher, SearchSettings, search_digest
from trtqwen.tune.space import Configuration, configurations, own_configuration, parse_space
from trtqwen.tune.target import Target

RECIPE = "qwen2-tiny-cpu"
CHANGES = ("checkpoint.tp_size=1", "engine.max_batch_size=4")
SWEEPS = (
    "engine.max_batch_size=2,4,16",
    "engine.max_num_tokens=64,256,512",
    "serve.max_tokens_in_paged_kv_cache=1024,2048,8192",
)


def main() -> None:
    """Run both searches and print who wins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for engines and results")
    parser.add_argument("--workload", default="smoke")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=288, help="of a whole run")
    parser.add_argument("--turns", type=int, default=5, help="runs of each winner at the end")
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

    begun = time.monotonic()
    journal = Journal(options.output, search_digest(content, space, target, settings, about))
    search = Searcher(
        recipe, content, space, target, settings, bench, journal, model=MODEL, about=about, on_progress=_say
    ).run()
    write_search(search, options.output)
    tuned_seconds = time.monotonic() - begun
    assert search.best is not None

    begun = time.monotonic()
    grid: dict[Configuration, float] = {}
    recipes: dict[Configuration, Recipe] = {}
    for configuration in configurations(recipe, space, seed=0):
        recipes[configuration] = Recipe.model_validate({**configuration.apply(content), "name": RECIPE})
        grid[configuration] = _rate(bench, recipes[configuration], options.requests)
        print(f"grid {len(grid)}: {grid[configuration]:,.0f} tokens/s", flush=True)
    grid_seconds = time.monotonic() - begun
    best = max(grid, key=lambda one: grid[one])
    tuned = next(one for one in grid if one.changes == search.best.changes)

    own = own_configuration(recipe, space)
    again: dict[Configuration, list[float]] = {one: [] for one in (tuned, best, own)}
    for _ in range(options.turns):
        for one, rates in again.items():
            rates.append(_rate(bench, recipes[one], options.requests))
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
    for name, one, runs, seconds in (
        ("tune", tuned, search.whole_runs, tuned_seconds),
        ("grid", best, float(len(grid)), grid_seconds),
        ("recipe", own, 0.0, 0.0),
    ):
        rate = statistics.median(again[one])
        print(f"| {name} | {one.title(own)} | {runs:.1f} | {seconds:.0f} | {rate:,.0f} |")
    print(f"\ntune's winner by the grid's: {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _rate(bench: Bench, recipe: Recipe, requests: int) -> float:
    return bench.run(recipe, requests).rates["output_token_throughput"].avg


def _say(progress: Progress) -> None:
    found = progress.trial.measures
    rate = f"{found.throughput:,.0f} tokens/s" if found else progress.trial.cause
    print(f"tune {progress.done}, {progress.trial.requests} requests, {progress.title}: {rate}", flush=True)


if __name__ == "__main__":
    main()

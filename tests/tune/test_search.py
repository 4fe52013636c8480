"""A search from end to end: on a function, on the simulator, and after a kill."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from trtqwen.bench.figures import Figures, figures
from trtqwen.bench.records import RequestRecord
from trtqwen.bench.setup import WorkloadOptions, named_workloads
from trtqwen.cli import app
from trtqwen.demo import MODEL
from trtqwen.diagnostics import EngineError, InputError, OutputError
from trtqwen.recipe import Recipe, load_recipe, recipe_content
from trtqwen.simulate.run import Load
from trtqwen.tune.bench import SimulatorBench
from trtqwen.tune.report import write_recipe, write_search
from trtqwen.tune.search import Searcher, SearchSettings, TargetMissed, pareto_front, search_digest
from trtqwen.tune.space import configurations, parse_space
from trtqwen.tune.target import Measures, Target
from trtqwen.tune.trials import JOURNAL, Trials

RECIPE = "qwen2-tiny-cpu"
SWEEPS = [
    "engine.max_batch_size=4,8,16,32",
    "engine.max_num_tokens=64,128,512",
    "serve.enable_chunked_context=true,false",
]
NO_LIMITS = Target()
ABOUT = {"on": "on the engine alone", "workload": "smoke", "load": "8 requests open", "sha256": "0" * 64}


class Played:
    """A bench whose figures follow from the fields; larger batches answer faster, up to 16."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.runs: list[tuple[int, int, int]] = []
        self._seconds = seconds

    def run(self, recipe: Recipe, requests: int) -> Figures:
        engine = recipe.engine
        self.runs.append((engine.max_batch_size, engine.max_num_tokens, requests))
        if engine.max_batch_size == 32:
            raise EngineError("out of memory", "lower engine.max_batch_size")
        step = self._seconds / engine.max_batch_size + 8 / engine.max_num_tokens
        records = [
            RequestRecord(n, 0.0, 2, pieces=[(step, 1), (2 * step, 1)], ended=2 * step, output_tokens=2)
            for n in range(requests)
        ]
        return figures([records], ())


def searcher(
    directory: Path, bench: Any, target: Target = NO_LIMITS, settings: SearchSettings | None = None
) -> Searcher:
    recipe, content = load_recipe(RECIPE), recipe_content(RECIPE)
    space = parse_space(recipe, SWEEPS)
    settings = settings or SearchSettings(candidates=24, requests=18)
    trials = Trials(directory, search_digest(content, space, target, settings, ABOUT))
    return Searcher(recipe, content, space, target, settings, bench, trials, model=None, about=ABOUT)


def test_finds_the_best_and_tells_what_became_of_the_others(tmp_path: Path) -> None:
    bench = Played()
    search = searcher(tmp_path, bench).run()
    assert search.best is not None
    assert search.best.title == "the recipe"  # batch 16 with 512 tokens is the best there is
    assert search.whole_runs <= 24 / 3 + 1
    rows = {row.title: row for row in search.rows}
    failed = rows["max_batch_size 32"]
    assert (failed.state, failed.cause) == ("failed", "out of memory")
    pruned = [row for row in search.rows if row.state == "pruned"]
    assert pruned
    assert all("max_num_tokens" in (row.cause or "") for row in pruned)
    assert {(row.changes["engine.max_batch_size"], row.changes["engine.max_num_tokens"]) for row in pruned} <= {
        (batch, tokens) for batch in (4, 8, 16, 32) for tokens in (64, 128, 512)
    }
    assert len(bench.runs) == search.runs


def test_writes_table_plot_and_recipe(tmp_path: Path) -> None:
    target = Target(time_to_first_token=150)
    search = searcher(tmp_path, Played(), target).run()
    paths = write_search(search, tmp_path)
    rows = list(csv.DictReader((tmp_path / "tune.csv").open()))
    assert len(rows) == len(search.rows)
    assert rows[0]["state"] == "meets"
    assert float(rows[0]["throughput, tokens/s"]) > 0
    assert json.loads((tmp_path / "tune.json").read_text())["best"]["title"] == search.rows[0].title
    html = (tmp_path / "tune.html").read_text()
    assert "Pareto front" in html
    assert "out of memory" in html
    assert len(paths) == 3
    other = next(row for row in search.rows if row.whole and row is not search.own) if len(search.rows) > 1 else None
    tuned = write_recipe(replace(search, best=other), RECIPE, tmp_path / "tuned.yaml")
    text = tuned.read_text()
    assert "# The bundled model on CPU" in text
    assert other is not None
    recipe = load_recipe(str(tuned))
    for name, value in other.changes.items():
        section, _, field = name.partition(".")
        assert getattr(getattr(recipe, section), field) == value
    kept = yaml.safe_load(text)
    assert kept["serve"]["max_queue_size"] == 256


def test_says_which_limit_was_missed_and_by_how_much(tmp_path: Path) -> None:
    search = searcher(tmp_path, Played(), Target(time_to_first_token=50)).run()
    assert search.best is None
    with pytest.raises(TargetMissed) as problem:
        search.check()
    assert "time to first token is 78.12 ms, the limit 50 ms, 56% beyond it" in problem.value.what


def test_a_search_in_which_nothing_runs_says_why(tmp_path: Path) -> None:
    class Broken:
        def run(self, recipe: Recipe, requests: int) -> Figures:
            raise EngineError("the card is on fire")

    search = searcher(tmp_path, Broken()).run()
    with pytest.raises(TargetMissed, match="no configuration could be run; the first: the card is on fire"):
        search.check()


def test_a_second_start_measures_nothing_again(tmp_path: Path) -> None:
    first, again = Played(), Played()
    one = searcher(tmp_path, first).run()
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"changes": {"engine.max_ba')  # cut by a kill
    other = searcher(tmp_path, again).run()
    assert again.runs == []
    assert other.reused == one.runs
    assert [row.title for row in other.rows] == [row.title for row in one.rows]
    with pytest.raises(OutputError, match="is of another search"):
        searcher(tmp_path, Played(), Target(time_to_first_token=1))


def test_the_front_has_only_what_nothing_beats() -> None:
    points = [Measures(rate, latency, 0, 0, 1) for rate, latency in ((10, 5), (20, 6), (15, 7), (30, 9), (30, 10))]
    assert pareto_front(points) == [points[0], points[1], points[3]]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


H100 = ("qwen2.5-7b-bf16-torch-h100", "--on", "simulator", "--workload", "smoke", "--concurrency", 8)


def test_tunes_on_the_simulator(tmp_path: Path) -> None:
    words = (*H100, "--set", "engine.max_batch_size=2", "--sweep", "engine.max_batch_size=2,4,8,16", "--requests", 72)
    result = run(*words, "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    best = json.loads(result.stdout)["best"]
    assert best["changes"] == {"engine.max_batch_size": 8}
    tuned = load_recipe(str(tmp_path / "qwen2.5-7b-bf16-torch-h100-tuned.yaml"))
    assert tuned.engine.max_batch_size == 8
    assert "forecasts" in (tmp_path / "qwen2.5-7b-bf16-torch-h100-tuned.yaml").read_text()


def test_a_trace_is_sent_at_its_times_and_a_short_file_makes_short_runs(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"token_ids": [300, 301], "max_tokens": 3, "at": 2.0 * number} for number in range(18)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("qwen2-tiny-cpu", "--set", "host.card=h100-sxm", "--set", "host.gpus=2", "--model", MODEL)
    sweep = ("--sweep", "engine.max_batch_size=8,16", "--workload", trace)
    result = run(*words, *sweep, "--on", "simulator", "--output", tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert report["settings"]["requests"] == 18
    assert report["about"]["load"] == "at the times of the workload"
    assert report["best"]["measures"]["throughput"] == pytest.approx(18 * 3 / 34, rel=0.01)


def test_a_missed_target_is_one_object_and_exit_code_1(tmp_path: Path) -> None:
    words = (*H100, "--sweep", "engine.max_batch_size=256,512", "--requests", 72, "--time-to-first-token", "1ms")
    result = run(*words, "--output", tmp_path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["best"] is None
    assert "beyond it" in report["error"]["what"]
    assert "error: " in result.stderr
    assert not list(tmp_path.glob("*.yaml"))


def test_layouts_are_tuned_on_the_simulator(tmp_path: Path) -> None:
    words = ("qwen2.5-7b-bf16-tp4-4090d", "--on", "simulator", "--workload", "rag", "--concurrency", 32)
    shorter = ("--output-tokens", 16, "--requests", 288)
    result = run(*words, *shorter, "--sweep", "layout=TP4x1,TP2x2,TP1x4,TP8x1", "--output", tmp_path, "--json")
    report = json.loads(result.stdout)
    assert report["best"]["changes"] == {"checkpoint.tp_size": 1, "serve.replicas": 4}
    [pruned] = [row for row in report["rows"] if row["state"] == "pruned"]
    assert pruned["changes"]["checkpoint.tp_size"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((RECIPE, "--on", "engine"), "an engine needs the model"),
        ((RECIPE, "--on", "simulator"), "names no card"),
        ((*H100, "--workload", "chatt"), "no such workload"),
        ((*H100, "--time-to-first-token", "500"), "is not a time"),
        ((*H100, "--requests", 20), "never have 8 of them open"),
        ((*H100, "--sweep", "engine.max_batch=3"), "cannot be swept|can be swept"),
    ],
)
def test_bad_input_is_refused(words: tuple[object, ...], message: str, tmp_path: Path) -> None:
    result = run(*words, "--output", tmp_path / "out")
    assert isinstance(result.exception, InputError)
    assert any(part in result.exception.what for part in message.split("|"))


def test_goes_on_after_kill_9(tmp_path: Path) -> None:
    words = ["tune", *map(str, H100), "--requests", "360", "--candidates", "12", "--output", str(tmp_path), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "trtqwen", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    while b"run 3," not in process.stderr.readline():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    report = json.loads(run(*words[1:]).stdout)
    assert 3 <= report["reused_runs"] < report["runs"]
    assert report == {**json.loads(run(*words[1:]).stdout), "reused_runs": report["reused_runs"]}


def test_finds_the_best_of_a_grid_on_the_simulator_in_a_third_of_the_runs(tmp_path: Path) -> None:
    changes = ("engine.max_batch_size=4", "engine.max_num_tokens=256", "engine.max_seq_len=256")
    recipe, content = load_recipe(H100[0], changes), recipe_content(H100[0], changes)
    sweeps = ["engine.max_batch_size=2,4,8", "engine.max_num_tokens=64,256,1024", "engine.tokens_per_block=16,32,64"]
    space = parse_space(recipe, sweeps)
    [workload] = named_workloads(WorkloadOptions("smoke", 72), range(1000), 1)
    bench = SimulatorBench(workload, Load(8), None)
    settings = SearchSettings(candidates=27, requests=72)
    search = Searcher(
        recipe, content, space, NO_LIMITS, settings, bench, Trials(tmp_path, ""), model=None, about=ABOUT
    ).run()
    assert search.whole_runs == pytest.approx(9)
    grid = [
        NO_LIMITS.measures(bench.run(Recipe.model_validate({**one.apply(content), "name": "x"}), 72)).throughput
        for one in configurations(recipe, space, 0)
    ]
    assert len(grid) == 27
    assert search.best is not None
    assert search.best.measures is not None
    assert search.best.measures.throughput == max(grid) > 1.5 * grid[0]

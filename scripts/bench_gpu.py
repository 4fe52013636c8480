"""Measures the embedded engine against vLLM on this machine's cards, both in one run, and writes the rows as JSON.

Loads are offline: token ids in and out, temperature 0.6, end ids ignored, no KV cache reuse, random weights in the
shape of a known model, the same for both. vLLM runs in a process of its own; `--vllm-path` names a directory that it
is installed in. Every ratio is of two numbers that this run measured. What our rates mean in operations and in bytes
read stands next to what the card itself reached in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from commit import commit
from gpu_work import Ceilings, measure_ceilings, operations, traffic
from random_engine import PRECISIONS, export_model, make_checkpoint

from trtqwen.engine.builder import build_engine
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import FinishReason, Request, SamplingConfig
from trtqwen.hf.known import known_config
from trtqwen.recipe import EngineRecipe

Shapes = list[tuple[int, int]]


@dataclass(frozen=True)
class Load:
    """Requests that are all there at the start.

    Attributes:
        unit: what is counted per second: answer tokens (`out`) or prompt tokens (`in`).
    """

    name: str
    shapes: Shapes
    unit: str = "out"

    @property
    def counted(self) -> int:
        """Tokens that the rate counts."""
        return sum(shape[1 if self.unit == "out" else 0] for shape in self.shapes)


@dataclass(frozen=True)
class Row:
    """One number of both engines; rates in tokens/s, starts in seconds. `ratio` above 1 means that ours is better.

    Attributes:
        tera_per_s: of our run, TFLOP/s or INT8 TOP/s for each card; None for starts.
        gb_per_s: bytes that our run read at least for each card; None where the number of steps is not known.
        card_tera_per_s, card_gb_per_s: what one card reached in this run with products and with reading alone.
    """

    load: str
    precision: str
    tp: int
    card: str
    ours: float | None
    vllm: float | None
    ratio: float | None
    commit: str
    tera_per_s: float | None
    gb_per_s: float | None
    card_tera_per_s: float
    card_gb_per_s: float


def loads() -> dict[str, Load]:
    """The loads of the comparison, by short name."""
    dice = random.Random(1)
    mixed = [(dice.randint(100, 1024), dice.randint(100, 1024)) for _ in range(256)]
    found = [
        Load("one", [(128, 256)]),
        Load("eight", [(128, 256)] * 8),
        Load("prompts", [(2048, 1)] * 64, "in"),
        Load("even", [(512, 256)] * 256),
        Load("mixed", mixed),
    ]
    return {load.name: load for load in found}


def run_ours(directory: Path, options: argparse.Namespace, precision: str) -> Iterator[tuple[str, float]]:
    """The start of the embedded engine, and its rate of each load."""
    limits = EngineRecipe(
        backend="torch", max_batch_size=256, max_num_tokens=options.max_num_tokens, max_seq_len=4096
    )
    checkpoint, engine = make_weights(directory, options, precision), directory / "engine"
    if not engine.is_dir():
        build_engine(checkpoint, limits, engine)
    say(f"{precision}: engine is made")
    config = ExecutorConfig(device="cuda", kv_cache_free_gpu_mem_fraction=0.9)
    begin = time.monotonic()
    with Executor(engine, config) as executor:
        answer(executor, [(16, 1)], options.model, 0)
        start = time.monotonic() - begin
        say(f"ours, {precision}: start {start:.1f} s")
        yield "start", start
        answer(executor, [(100, 8)] * 16, options.model, 1)
        for load in chosen(options):
            times = [answer(executor, load.shapes, options.model, 2 + turn) for turn in range(options.turns)]
            seconds = statistics.median(times)
            say(f"ours, {precision}, {load.name}: {load.counted / seconds:.1f} {load.unit} tok/s ({seconds:.2f} s)")
            yield load.name, load.counted / seconds


def make_weights(directory: Path, options: argparse.Namespace, precision: str) -> Path:
    """The checkpoint of both sides."""
    checkpoint = directory / "checkpoint"
    if not checkpoint.is_dir():
        make_checkpoint(checkpoint, options.model, precision, options.tp)
    return checkpoint


def answer(executor: Executor, shapes: Shapes, model: str, seed: int) -> float:
    """Seconds that the requests took together."""
    vocab_size = known_config(model).vocab_size
    dice = random.Random(seed)
    sampling = SamplingConfig(temperature=0.6, top_p=1.0, seed=seed)
    requests = [
        Request(
            id=str(index),
            input_token_ids=tuple(dice.randrange(vocab_size) for _ in range(prompt)),
            max_tokens=count,
            sampling=sampling,
        )
        for index, (prompt, count) in enumerate(shapes)
    ]
    begin = time.monotonic()
    answers = executor.generate(requests)
    seconds = time.monotonic() - begin
    for responses, (_, count) in zip(answers, shapes, strict=True):
        if responses[-1].finish_reason is not FinishReason.LENGTH:
            raise SystemExit(f"a request failed: {responses[-1].error}")
        assert sum(len(response.token_ids) for response in responses) == count
    return seconds


def run_vllm(directory: Path, options: argparse.Namespace, precision: str) -> Iterator[tuple[str, float]]:
    """The same on vLLM, in a process of its own."""
    checkpoint, home = make_weights(directory, options, precision), directory / "hf"
    if not home.is_dir():
        export_model(checkpoint, home)
    say(f"{precision}: model for vLLM is written")
    job = {
        "model": str(home),
        "tp": options.tp,
        "loads": [(load.name, load.shapes, load.counted) for load in chosen(options)],
        "vocab_size": known_config(options.model).vocab_size,
        "turns": options.turns,
    }
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if options.vllm_path:
        environment["PYTHONPATH"] = os.pathsep.join([options.vllm_path, os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("bench_gpu_vllm.py")
    command = [options.vllm, str(script), json.dumps(job)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("RESULT "):
                    name, value = json.loads(line.removeprefix("RESULT "))
                    say(f"vLLM, {precision}, {name}: {value:.1f}")
                    yield name, value
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own


def rows(
    ours: dict[str, float], vllm: dict[str, float], precision: str, ceilings: Ceilings, options: argparse.Namespace
) -> Iterator[Row]:
    """Both sides, load by load."""
    config = known_config(options.model)
    for name in dict.fromkeys([*ours, *vllm]):
        mine, theirs = ours.get(name), vllm.get(name)
        ratio = tera = read = None
        if mine and theirs:
            ratio = theirs / mine if name == "start" else mine / theirs
        if mine and name != "start":
            load = loads()[name]
            seconds = load.counted / mine * options.tp
            tera = operations(config, load.shapes) / seconds / 1e12
            least = traffic(config, precision, load.shapes)
            read = least and least / seconds / 1e9
        yield Row(
            load=name,
            precision=precision,
            tp=options.tp,
            card=torch.cuda.get_device_name(),
            ours=mine,
            vllm=theirs,
            ratio=ratio,
            commit=commit(),
            tera_per_s=tera,
            gb_per_s=read,
            card_tera_per_s=ceilings.products,
            card_gb_per_s=ceilings.reading,
        )


def chosen(options: argparse.Namespace) -> list[Load]:
    """The loads to run."""
    return [load for name, load in loads().items() if name in options.loads]


def say(line: str) -> None:
    """Progress, on standard error."""
    print(f"[{time.monotonic():.0f}] {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line, run both engines, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp16", "w8a8"])
    parser.add_argument("--loads", nargs="+", choices=loads(), default=list(loads()))
    parser.add_argument("--engines", nargs="+", choices=["ours", "vllm"], default=["ours", "vllm"])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="how often each load runs; its rate is the median")
    parser.add_argument("--max-num-tokens", type=int, default=16384, help="of our steps; the default is vLLM's own")
    parser.add_argument("--vllm", default=sys.executable, help="python that has vLLM")
    parser.add_argument("--vllm-path", help="directory that vLLM is installed in")
    parser.add_argument("--scratch", help="directory for the random weights; memory is fastest")
    parser.add_argument("--weights", type=Path, help="directory that keeps the random weights for the next run")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # vLLM ends, too
    found: list[Row] = []
    for precision in options.precisions:
        before, ceilings = list(found), measure_ceilings(precision)
        torch.cuda.empty_cache()
        with ExitStack() as stack:
            if options.weights:
                directory = options.weights / f"{precision}-tp{options.tp}"
            else:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.scratch)))
            results: dict[str, dict[str, float]] = {"ours": {}, "vllm": {}}
            for engine in options.engines:
                run = run_ours if engine == "ours" else run_vllm
                for name, value in run(directory, options, precision):
                    results[engine][name] = value
                    found = [*before, *rows(results["ours"], results["vllm"], precision, ceilings, options)]
                    if options.output:  # what is measured stays, also where the run ends early
                        content = json.dumps([asdict(row) for row in found], indent=1)
                        options.output.write_text(content, encoding="utf-8")
    for row in found:
        print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()

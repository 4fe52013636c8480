"""Holds the simulator against what was measured: python scripts/simulate_measured.py

Three tables in Markdown: the loads of bench_gpu.py (gpu_8192.json and gpu.json in docs/benchmarks), engines behind
their servers (serve_vllm.json and serve.json), and the public points of trtqwen/plan/measured.json. Every row is
printed, those too that the simulator misses.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trtqwen.bench.workload import Ask
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.executor.scheduler import SchedulerConfig
from trtqwen.plan.assumptions import assumptions
from trtqwen.plan.measured import Point, measured, point_rates, point_roofline
from trtqwen.recipe import Recipe
from trtqwen.simulate.corrections import EngineName, Precision, corrections
from trtqwen.simulate.cost import CostModel
from trtqwen.simulate.deployment import Deployment, deploy
from trtqwen.simulate.engine import StepWork, VirtualEngine
from trtqwen.simulate.play import play

BENCHMARKS = Path(__file__).parent.parent / "docs" / "benchmarks"
_CARDS = {"NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA H200": "h200-sxm"}
_QUANTS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "w8a8": {"quant": "int8_sq", "per_channel": True, "per_token": True},
}
_STEPS = {
    "gpu_8192.json": 8192,
    "gpu.json": 16384,
}  # max_num_tokens of the embedded engine in each run of bench_gpu.py
_SERVED_STEPS = {"NVIDIA H100 80GB HBM3": 16384, "NVIDIA H200": 4096}  # the same in the runs of bench_serve.py
_VLLM_LIMITS = (1024, 16384)  # max_batch_size, max_num_tokens: vLLM's defaults on these cards
_STREAMS = 4  # requests of each stream in bench_serve.py
_KV_SHARE, _OTHER_BYTES = 0.9, 1 << 30  # of a public point's card: KV cache, and what is neither weights nor cache
_ONLINE = ("databasemart", "mushfiqrahman", "chinmayhebbal")  # measured through an HTTP server
_AT_ONCE = {"databasemart": 300}


@dataclass(frozen=True)
class Row:
    """A measurement and its forecast, in the same unit.

    Attributes:
        calibrates: whether a correction was fitted to it.
        bound: what the simulator says nothing exceeds.
    """

    name: str
    measured: float
    forecast: float
    bound: float
    calibrates: bool = False

    @property
    def error(self) -> float:
        return self.forecast / self.measured - 1


def _read(file: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))
    return rows


def gpu_rows() -> Iterator[Row]:
    """The offline loads of the embedded engine and of vLLM."""
    for file, steps in _STEPS.items():
        for row in _read(file):
            for engine, column, limits in (("torch", "ours", (256, steps)), ("vllm", "vllm", _VLLM_LIMITS)):
                if row["load"] != "start" and row[column] is not None:
                    place = _CARDS[row["card"]], row["precision"], row["tp"]
                    yield _gpu_row(engine, limits, *place, row["load"], row[column])


def _gpu_row(
    engine: str, limits: tuple[int, int], card: str, precision: str, tp_size: int, load: str, value: float
) -> Row:
    cost = _deployment(engine, card, precision, tp_size, *limits).cost
    works, counted = _schedule(engine, limits, load)
    forecast, bound = counted / sum(map(cost.forecast, works)), counted / cost.bound(works).least
    first = (card, precision, tp_size, load) == ("h100-sxm", "fp16", 1, "one")
    return Row(f"{engine}, {card}, {precision}, TP{tp_size}, {load}", value, forecast, bound, first)


def serve_rows() -> Iterator[Row]:
    """vLLM behind its server, the embedded engine behind Triton: closed loops of 512 tokens in and 256 out."""
    token = corrections().serving["vllm"].token_us * 1e-6
    rows = _read("serve_vllm.json")
    found = _deployment("vllm", "h100-sxm", "fp16", 1, 256, 8192)
    yield from _serve_rows(rows, "vllm", "vllm serve", found, token)
    rows = _read("serve.json")
    for card, steps in _SERVED_STEPS.items():
        found = _deployment("torch", _CARDS[card], "fp16", 1, 256, steps)
        here = [row for row in rows if row["card"] == card]
        yield from _serve_rows(here, "ours", f"trtqwen serve, {_CARDS[card]}", found, 0)


def _serve_rows(
    rows: list[dict[str, Any]], column: str, name: str, found: Deployment, token_seconds: float
) -> Iterator[Row]:
    for row in rows:
        if row["unit"] == "output tokens/s" and row[column]:
            places = int(row["load"].split()[0])
            engines = found.engines()
            asks = [Ask((index % 1000,) * row["inputs"], row["outputs"]) for index in range(_STREAMS * places)]
            records = play(asks, engines, concurrency=places, token_seconds=token_seconds)
            tokens, seconds = len(asks) * row["outputs"], max(record.ended for record in records)
            bound = tokens / found.cost.bound(engines[0].work).least
            yield Row(f"{name}, {row['load']}", row[column], tokens / seconds, bound)


def point_row(point: Point) -> Row:
    """The forecast of a public point."""
    config, rates = measured().models[point.model].config, point_rates(point)
    engine: EngineName = "vllm" if point.system.startswith("vLLM") else "tensorrt_llm"
    sixteen = point.precision in ("float16", "bfloat16")
    precision: Precision = "float16" if sixteen else point.precision  # type: ignore[assignment]
    cost = CostModel(
        config,
        RankMapping(point.tp_size),
        rates,
        point_roofline(point),
        card=point.card,
        engine=engine,
        precision=precision,
        link=assumptions().links.typical,
    )
    places = point.in_flight if point.kind == "throughput" else 1
    count = 4 * places if point.kind == "throughput" and "docs/source/performance.md" not in point.source else places
    count = next((number for name, number in _AT_ONCE.items() if name in point.source), count)
    embedding = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    free = _KV_SHARE * measured().cards[point.card].usable_gib * 2**30 - rates.weights - embedding - _OTHER_BYTES
    limits = SchedulerConfig(
        max_batch_size=max(256, places),
        max_num_tokens=8192,
        max_seq_len=8192,
        tokens_per_block=16,
        num_blocks=int(free / rates.kv_token) // 16,
        vocab_size=config.vocab_size,
        batch_scheduler_policy="max_utilization",
    )
    engines = [VirtualEngine(limits, cost.forecast, overlap=True) for _ in range(point.replicas)]
    online = engine == "vllm" and point.kind == "throughput" and any(name in point.source for name in _ONLINE)
    records = play(
        [Ask((1,) * point.prompt, point.answer or 1)] * count,
        engines,
        concurrency=max(places, count if count == 300 else places),
        token_seconds=corrections().serving["vllm"].token_us * 1e-6 if online else 0,
    )
    seconds = max(record.ended for record in records)
    least = max(cost.bound(one.work).least for one in engines)
    tokens = sum(record.output_tokens for record in records)
    if point.kind == "context":
        forecast, bound = point.prompt / seconds, point.prompt / least
    elif point.kind == "generation":
        forecast, bound = (tokens - 1) / (seconds - records[0].first), tokens / least
    else:
        forecast, bound = tokens / seconds, tokens / least
    layout = f"TP{point.tp_size} x {point.replicas}"
    load = f"{point.kind} {point.prompt}/{point.answer}, {point.in_flight} in flight"
    name = f"{point.card} {layout}, {point.system}, {point.model} {point.precision}, {load}"
    fitted = corrections().engines["tensorrt_llm"].calibrated_on
    calibrates = point.system == "TensorRT-Edge-LLM" and point.kind == "generation" and "Edge" in fitted
    return Row(name, point.tokens_per_s, forecast, bound, calibrates)


@cache
def _deployment(
    engine: str, card: str, precision: str, tp_size: int, max_batch_size: int, max_num_tokens: int
) -> Deployment:
    recipe = Recipe.model_validate(
        {
            "name": "measured",
            "description": "What was measured.",
            "model": "qwen2.5-7b",
            "host": {"card": card, "gpus": tp_size},
            "checkpoint": {"dtype": "float16", "tp_size": tp_size, **_QUANTS[precision]},
            "engine": {
                "backend": engine,
                "max_batch_size": max_batch_size,
                "max_num_tokens": max_num_tokens,
                "max_seq_len": 4096,
            },
        }
    )
    return deploy(recipe)


@cache
def _schedule(engine: str, limits: tuple[int, int], load: str) -> tuple[list[StepWork], int]:
    """The steps of a load that is there at the start, and the tokens that count: the same on all cards."""
    [virtual] = _deployment(engine, "h200-sxm", "fp16", 1, *limits).engines()
    shapes = _loads()[load]
    play([Ask((1,) * prompt, answer) for prompt, answer in shapes], [virtual], concurrency=len(shapes))
    return virtual.work, sum(prompt if load == "prompts" else answer for prompt, answer in shapes)


def _loads() -> dict[str, list[tuple[int, int]]]:
    """The loads of bench_gpu.py, which needs PyTorch and a GPU to import."""
    dice = random.Random(1)
    mixed = [(dice.randint(100, 1024), dice.randint(100, 1024)) for _ in range(256)]
    return {
        "one": [(128, 256)],
        "eight": [(128, 256)] * 8,
        "prompts": [(2048, 1)] * 64,
        "even": [(512, 256)] * 256,
        "mixed": mixed,
    }


def _print(title: str, rows: Iterator[Row] | list[Row], most: float) -> None:
    print(f"\n{title}\n\n| load | measured | forecast | error | bound |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        note = " (calibrates)" if row.calibrates else " **missed**" if abs(row.error) > most else ""
        figures = f"{row.measured:,.1f} | {row.forecast:,.1f} | {row.error:+.1%}{note} | {row.bound:,.1f}"
        print(f"| {row.name} | {figures} |")


def main() -> None:
    """Print the tables."""
    _print("Offline, H100 and H200", gpu_rows(), 0.15)
    _print("Behind a server: vLLM on an H100, trtqwen on both cards", serve_rows(), 0.15)
    _print("Public points", [point_row(point) for point in measured().points], 0.25)


if __name__ == "__main__":
    main()

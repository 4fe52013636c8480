"""Forecast what the share of prompts in a step changes: python scripts/simulate_share.py

Plays closed loops of equal requests on one H100 (Qwen2.5-7B in bfloat16), with steps that take all prompts and with
steps that take the scheduler's share of them. A client sends its next request at the end of an answer. The first
round, in which all requests come at once, is not counted. The table of docs/engine.md has these figures.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from trtqwen.bench.workload import Ask
from trtqwen.recipe import load_recipe
from trtqwen.simulate.deployment import deploy
from trtqwen.simulate.engine import VirtualEngine
from trtqwen.simulate.play import play

RECIPE = "qwen2.5-7b-bf16-torch-h100"
LOADS = ((8, 512, 256), (64, 512, 256), (256, 512, 256), (8, 2048, 128), (64, 2048, 128), (64, 128, 512))
ROUNDS = 4


def main() -> None:
    """Print one row for each load."""
    found = deploy(load_recipe(RECIPE))
    print("requests  in, out    median first token, ms  output tokens/s")
    for requests, prompt, answer in LOADS:
        figures = []
        for share in (0, found.limits.context_share):
            limits = replace(found.limits, context_share=share, enable_kv_cache_reuse=False)
            engine = VirtualEngine(limits, found.cost.forecast, overlap=found.overlap)
            asks = [Ask((1,) * prompt, answer)] * (requests * ROUNDS)
            records = play(asks, [engine], concurrency=requests)[requests:]
            seconds = max(record.ended for record in records) - min(record.sent for record in records)
            first = median(record.pieces[0][0] - record.sent for record in records)
            figures.append((1000 * first, sum(record.output_tokens for record in records) / seconds))
        (whole, whole_rate), (shared, rate) = figures
        print(
            f"{requests:8} {prompt:5}, {answer:4} {whole:10.0f} -> {shared:6.0f} {whole_rate:12,.0f} -> {rate:8,.0f}"
        )


if __name__ == "__main__":
    main()

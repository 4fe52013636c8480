"""vLLM's side of bench_gpu.py: one JSON job in, one line `RESULT [name, value]` for each load out."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time


def main() -> None:
    """Start vLLM and run the loads."""
    job = json.loads(sys.argv[1])
    begin = time.monotonic()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype="float16",
        max_model_len=4096,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        tensor_parallel_size=job["tp"],
        disable_log_stats=True,
    )

    def answer(shapes: list[tuple[int, int]], seed: int) -> float:
        dice = random.Random(seed)
        prompts = [{"prompt_token_ids": [dice.randrange(job["vocab_size"]) for _ in range(n)]} for n, _ in shapes]
        params = [
            SamplingParams(temperature=0.6, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in shapes
        ]
        start = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - start
        assert [len(output.outputs[0].token_ids) for output in outputs] == [count for _, count in shapes]
        return seconds

    answer([(16, 1)], 0)
    say("start", time.monotonic() - begin)
    answer([(100, 8)] * 16, 1)
    for name, shapes, counted in job["loads"]:
        times = [answer([tuple(shape) for shape in shapes], 2 + turn) for turn in range(job["turns"])]
        say(name, counted / statistics.median(times))


def say(name: str, value: float) -> None:
    """One result."""
    print("RESULT " + json.dumps([name, value]), flush=True)


if __name__ == "__main__":
    main()

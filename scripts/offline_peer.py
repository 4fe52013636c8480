"""Runs one engine without a server for bench_cpu.py: python offline_peer.py ENGINE DIRECTORY OPTIONS

ENGINE is trtqwen, vllm or transformers; DIRECTORY a built engine or a Hugging Face model; OPTIONS a JSON object. Each
line of standard input is a load, {"batch": N, "inputs": N, "outputs": N}; the answer is a line with its seconds. This
script imports nothing of trtqwen unless asked to: it also runs in vLLM's environment.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], int]


def trtqwen(directory: str, options: dict[str, Any]) -> Generate:
    from trtqwen.executor.config import ExecutorConfig
    from trtqwen.executor.executor import Executor
    from trtqwen.executor.request import Request

    executor = Executor(Path(directory), ExecutorConfig(max_tokens_in_paged_kv_cache=options["kv_tokens"]))

    def generate(prompts: list[list[int]], outputs: int) -> int:
        requests = [
            Request(id=str(index), input_token_ids=tuple(prompt), max_tokens=outputs)
            for index, prompt in enumerate(prompts)
        ]
        return sum(len(response.token_ids) for answer in executor.generate(requests) for response in answer)

    return generate


def vllm(directory: str, options: dict[str, Any]) -> Generate:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    engine = LLM(
        directory,
        dtype=options["dtype"],
        max_model_len=options["max_model_len"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **options.get("vllm", {}),
    )

    def generate(prompts: list[list[int]], outputs: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return generate


def transformers(directory: str, options: dict[str, Any]) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, options["dtype"]))

    def generate(prompts: list[list[int]], outputs: int) -> int:
        ids = torch.tensor(prompts)
        limits = {"max_new_tokens": outputs, "min_new_tokens": outputs, "do_sample": False, "pad_token_id": 0}
        done = model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        return int((done.shape[1] - ids.shape[1]) * len(prompts))

    return generate


def main() -> None:
    name, directory, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is for the log
    begun = time.perf_counter()
    generate = {"trtqwen": trtqwen, "vllm": vllm, "transformers": transformers}[name](directory, options)
    generate([[5, 6, 7]], 2)
    print(json.dumps({"start_s": round(time.perf_counter() - begun, 1)}), file=answers, flush=True)
    rng = random.Random(1)
    for line in sys.stdin:
        load = json.loads(line)
        prompts = [[rng.randrange(300, 4000) for _ in range(load["inputs"])] for _ in range(load["batch"])]
        begun = time.perf_counter()
        tokens = generate(prompts, load["outputs"])
        print(json.dumps({"seconds": time.perf_counter() - begun, "tokens": tokens}), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

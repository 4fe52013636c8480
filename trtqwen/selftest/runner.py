"""Runs a TensorRT engine: a script for the Python that has TensorRT-LLM, where trtqwen need not be installed.

Standard input: one JSON object with `engine`, `prompts` (token ids), `max_tokens` and `answers`, the file to write
the greedy token ids to. Standard output is TensorRT-LLM's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tensorrt_llm.runtime import ModelRunnerCpp


def main() -> None:
    """Generate for all prompts at once, as in-flight batching does."""
    job = json.load(sys.stdin)
    runner = ModelRunnerCpp.from_dir(
        engine_dir=job["engine"],
        max_tokens_in_paged_kv_cache=8192,
        enable_context_fmha_fp32_acc=True,
    )
    output = runner.generate(
        [torch.tensor(prompt, dtype=torch.int32) for prompt in job["prompts"]],
        max_new_tokens=job["max_tokens"],
        end_id=-1,  # none: answers of one length compare best
        pad_id=0,
        top_k=1,
        return_dict=True,
        output_sequence_lengths=True,
    )
    rows = zip(job["prompts"], output["output_ids"], output["sequence_lengths"], strict=True)
    answers = [beams[0, len(prompt) : int(lengths[0])].tolist() for prompt, beams, lengths in rows]
    Path(job["answers"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()

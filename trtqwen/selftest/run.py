"""Whether TensorRT-LLM on this machine computes what the embedded engine does: the bundled model through both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.demo.walkthrough import load_prompts
from trtqwen.diagnostics import EngineError
from trtqwen.engine.builder import build_engine
from trtqwen.engine.explain import explain
from trtqwen.engine.job import Watch
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import Request
from trtqwen.facts.releases import known_release, last_engine_release, newest_image
from trtqwen.hf.tokenizer import Tokenizer, render_chat
from trtqwen.nn.ops import rms_norm, to_torch
from trtqwen.recipe import CheckpointRecipe, EngineRecipe
from trtqwen.system.host import Host
from trtqwen.verify.ranks import CheckpointRanks

Dtype = Literal["float16", "bfloat16"]
Verdict = Literal["same", "tie", "differs"]
Margin = Callable[[list[int], int], float]

MAX_TOKENS = 48
# How far below the best logit a token may lie and still be a matter of rounding: four times what was seen. Computing
# the bundled model in the dtype instead of float32 (transformers, CPU, 512 tokens) moved the difference between two
# of the eight best logits by 0.022 and 0.24 at most. Half of all best logits lead by more than 6.9.
TIE = {"float16": 0.1, "bfloat16": 1.0}
_RUNNER = Path(__file__).with_name("runner.py")
_SECONDS = 900


@dataclass(frozen=True)
class PromptResult:
    """One prompt's greedy answers.

    Attributes:
        same_tokens: how many agree before the first that differs; what follows on that is another text.
        verdict: `tie` if the first differing token is as good as the best one, up to rounding.
        margin: how far below the best logit the embedded engine puts TensorRT-LLM's token; None if all agree.
    """

    prompt: str
    same_tokens: int
    verdict: Verdict
    margin: float | None = None


@dataclass(frozen=True)
class DtypeResult:
    """All prompts in one dtype."""

    dtype: Dtype
    prompts: tuple[PromptResult, ...]

    @property
    def ok(self) -> bool:
        return all(result.verdict != "differs" for result in self.prompts)


def run_selftest(
    host: Host,
    directory: Path,
    *,
    dtypes: Sequence[Dtype] = ("float16", "bfloat16"),
    watch: Watch = lambda progress: None,
) -> list[DtypeResult]:
    """Convert the bundled model, build it both ways, and compare the greedy answers.

    Args:
        directory: for the checkpoints, engines and build logs; what is there is replaced.

    Raises:
        EngineError: if this machine cannot build or run the engine.
    """
    check_machine(host)
    tokenizer = Tokenizer(MODEL)
    assert tokenizer.chat_template is not None
    texts = [prompt.prompt for prompt in load_prompts()]
    prompts = [
        tokenizer.encode(render_chat(tokenizer.chat_template, [{"role": "user", "content": text}])) for text in texts
    ]
    results = []
    for dtype in dtypes:
        checkpoint, embedded, tensorrt = _build(host, directory / dtype, dtype, watch)
        answers = zip(
            texts, prompts, _run_embedded(embedded, prompts), _run_tensorrt(host, tensorrt, prompts), strict=True
        )
        margin = _margins(checkpoint)
        judged = tuple(
            judge(text, prompt, ours, theirs, margin, TIE[dtype]) for text, prompt, ours, theirs in answers
        )
        results.append(DtypeResult(dtype, judged))
    return results


def judge(
    text: str, prompt: list[int], ours: list[int], theirs: list[int], margin: Margin, tie: float
) -> PromptResult:
    """Compare two greedy answers to one prompt.

    Args:
        ours, theirs: token ids of the embedded engine and of TensorRT-LLM.
        margin: how far below the best logit a token lies after a sequence.
        tie: the largest margin that is a matter of rounding.
    """
    same = next((index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if same is None:
        complete = len(ours) == len(theirs)
        return PromptResult(text, min(len(ours), len(theirs)), "same" if complete else "differs")
    distance = margin(prompt + ours[:same], theirs[same])
    return PromptResult(text, same, "tie" if distance <= tie else "differs", distance)


def check_machine(host: Host) -> None:
    """Refuse a machine without TensorRT-LLM or without a GPU.

    Raises:
        EngineError: naming what is missing.
    """
    present = {"trtllm-build": host.trtllm_build, "a GPU": host.visible_gpus}
    missing = [name for name, found in present.items() if not found]
    if missing:
        image = newest_image(last_engine_release()).image
        raise EngineError(
            (
                "selftest compares TensorRT-LLM with the embedded engine, and this machine lacks "
                f"{' and '.join(missing)}"
            ),
            f"run `trtqwen selftest --in-container` on a GPU host, which takes {image}",
        )


def _build(host: Host, directory: Path, dtype: Dtype, watch: Watch) -> tuple[Path, Path, Path]:
    """The checkpoint, its embedded engine and its TensorRT engine."""
    # An unknown release falls to the newest; the builder then says what is wrong with it.
    release = known_release(host.tensorrt_llm) or last_engine_release()
    checkpoint, embedded, tensorrt = (directory / name for name in ("checkpoint", "embedded", "tensorrt_llm"))
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype=dtype, release=release)), checkpoint, force=True)
    recipe = EngineRecipe(backend="torch", max_batch_size=8, max_num_tokens=512, max_seq_len=512)
    build_engine(checkpoint, recipe, embedded, force=True)
    recipe = recipe.model_copy(update={"backend": "tensorrt_llm"})
    build_engine(checkpoint, recipe, tensorrt, force=True, host=host, watch=watch)
    return checkpoint, embedded, tensorrt


def _run_embedded(engine: Path, prompts: list[list[int]]) -> list[list[int]]:
    requests = [
        Request(id=str(index), input_token_ids=tuple(prompt), max_tokens=MAX_TOKENS)
        for index, prompt in enumerate(prompts)
    ]
    with Executor(engine) as executor:
        return [
            [token for response in responses for token in response.token_ids]
            for responses in executor.generate(requests)
        ]


def _run_tensorrt(host: Host, engine: Path, prompts: list[list[int]]) -> list[list[int]]:
    answers = engine.with_name("answers.json")
    answers.unlink(missing_ok=True)
    job = {"engine": str(engine), "prompts": prompts, "max_tokens": MAX_TOKENS, "answers": str(answers)}
    command = [str(host.python or sys.executable), str(_RUNNER)]
    try:
        result = subprocess.run(
            command,
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{engine}: gave no answers within {_SECONDS} s", "check nvidia-smi") from None
    if result.returncode != 0 or not answers.is_file():
        first = explain(result.stdout.splitlines()).first
        why = first.cause if first else result.stdout.strip()[-300:]
        raise EngineError(
            f"{engine}: did not run (exit code {result.returncode}): {why}", first.hint if first else ""
        )
    content: list[list[int]] = json.loads(answers.read_text(encoding="utf-8"))
    return content


def _margins(checkpoint: Path) -> Margin:
    """Logits of the checkpoint in float32, as the embedded engine computes them, asked for where answers part."""
    ranks = CheckpointRanks(checkpoint, "plain", torch.device("cpu"))
    config = ranks.config

    @torch.inference_mode()
    def margin(sequence: list[int], token: int) -> float:
        hidden = ranks.embed(sequence)
        for index in range(config.num_hidden_layers):
            layer = ranks.layer(index)
            hidden = hidden + layer.attention(hidden)
            hidden = hidden + layer.mlp(hidden)
        gain = to_torch(ranks.final_gains()[0]).float()
        head = to_torch(ranks.head_rows(np.arange(config.vocab_size))).float()
        logits = F.linear(rms_norm(hidden[-1], gain, config.norm_epsilon), head)
        return float(logits.max() - logits[token])

    return margin

"""The selftest: compare an engine of this machine with the embedded engine on its CPU, with the bundled model.

The engine is TensorRT-LLM's, or the embedded one on a CUDA device.
"""

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
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import Request
from trtqwen.facts.releases import known_release, last_engine_release, newest_image
from trtqwen.hf.tokenizer import Tokenizer, render_chat
from trtqwen.nn.ops import rms_norm, to_torch
from trtqwen.recipe import CheckpointRecipe, EngineRecipe
from trtqwen.system.host import Host
from trtqwen.verify.ranks import CheckpointRanks

Dtype = Literal["float16", "bfloat16", "float32"]
Backend = Literal["tensorrt_llm", "torch"]
Verdict = Literal["same", "tie", "differs"]
Margin = Callable[[list[int], int], float]

MAX_TOKENS = 48
# How far below the best logit a token may lie and still be a matter of rounding: four times what was seen. Computing
# the bundled model in the dtype instead of float32 (transformers, CPU, 512 tokens) moved the difference between two
# of the eight best logits by 0.022 and 0.24 at most. Half of all best logits lead by more than 6.9.
TIE: dict[Dtype, float] = {"float16": 0.1, "bfloat16": 1.0, "float32": 1e-3}
DTYPES: dict[Backend, tuple[Dtype, ...]] = {
    "tensorrt_llm": ("float16", "bfloat16"),
    "torch": ("float32", "float16", "bfloat16"),
}
_RUNNER = Path(__file__).with_name("runner.py")
_SECONDS = 900
_LIMITS = EngineRecipe(backend="torch", max_batch_size=8, max_num_tokens=512, max_seq_len=512)


@dataclass(frozen=True)
class PromptResult:
    """One prompt's greedy answers.

    Attributes:
        same_tokens: how many agree before the first that differs; what follows on that is another text.
        verdict: `tie` if the first differing token is as good as the best one, up to rounding.
        margin: how far below the best logit the CPU puts the other engine's token; None if all agree.
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
    backend: Backend = "tensorrt_llm",
    dtypes: Sequence[Dtype] | None = None,
    watch: Watch = lambda progress: None,
) -> list[DtypeResult]:
    """Convert the bundled model, build it, and compare greedy answers with those of the embedded engine on the CPU.

    Args:
        directory: for the checkpoints, engines and build logs; what is there is replaced.
        backend: what is tested: TensorRT-LLM, or the embedded engine on a CUDA device.
        dtypes: in turn; those of `DTYPES` by default.

    Raises:
        EngineError: if this machine cannot build or run the engine.
    """
    check_machine(host, backend)
    results = []
    for dtype in dtypes or DTYPES[backend]:
        checkpoint, embedded = _build_embedded(host, directory / dtype, dtype)
        if backend == "torch":
            results.append(compare_devices(checkpoint, embedded, dtype, ExecutorConfig(device="cuda")))
            continue
        prompts = _prompts()
        theirs = _run_tensorrt(host, _build_tensorrt(host, checkpoint, watch), list(prompts.values()))
        results.append(_judge_all(checkpoint, embedded, dtype, theirs))
    return results


def compare_devices(checkpoint: Path, engine: Path, dtype: Dtype, tested: ExecutorConfig) -> DtypeResult:
    """Compare the embedded engine on `tested` with itself on the CPU."""
    return _judge_all(checkpoint, engine, dtype, _run_embedded(engine, list(_prompts().values()), tested))


def _judge_all(checkpoint: Path, embedded: Path, dtype: Dtype, theirs: list[list[int]]) -> DtypeResult:
    prompts = _prompts()
    ours = _run_embedded(embedded, list(prompts.values()), ExecutorConfig(device="cpu"))
    margin = _margins(checkpoint)
    judged = (
        judge(text, prompt, mine, other, margin, TIE[dtype])
        for (text, prompt), mine, other in zip(prompts.items(), ours, theirs, strict=True)
    )
    return DtypeResult(dtype, tuple(judged))


def _prompts() -> dict[str, list[int]]:
    """Token ids of the demo's prompts as chats, by text."""
    tokenizer = Tokenizer(MODEL)
    template = tokenizer.chat_template
    assert template is not None
    texts = [prompt.prompt for prompt in load_prompts()]
    return {text: tokenizer.encode(render_chat(template, [{"role": "user", "content": text}])) for text in texts}


def judge(
    text: str, prompt: list[int], ours: list[int], theirs: list[int], margin: Margin, tie: float
) -> PromptResult:
    """Compare two greedy answers to one prompt.

    Args:
        ours, theirs: token ids of the embedded engine on the CPU, and of the engine that is tested.
        margin: how far below the best logit a token lies after a sequence.
        tie: the largest margin that is a matter of rounding.
    """
    same = next((index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if same is None:
        complete = len(ours) == len(theirs)
        return PromptResult(text, min(len(ours), len(theirs)), "same" if complete else "differs")
    distance = margin(prompt + ours[:same], theirs[same])
    return PromptResult(text, same, "tie" if distance <= tie else "differs", distance)


def check_machine(host: Host, backend: Backend) -> None:
    """Refuse a machine without the tested engine or device.

    Raises:
        EngineError: naming what is missing.
    """
    if backend == "torch":
        if not torch.cuda.is_available():
            raise EngineError(
                "selftest --backend torch compares a CUDA device with the CPU, and PyTorch finds no CUDA device",
                "run it on a GPU host, with a CUDA build of PyTorch",
            )
        return
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


def _build_embedded(host: Host, directory: Path, dtype: Dtype) -> tuple[Path, Path]:
    """The checkpoint and its embedded engine."""
    # An unknown release falls to the newest; the builder then says what is wrong with it.
    release = known_release(host.tensorrt_llm) or last_engine_release()
    checkpoint, embedded = directory / "checkpoint", directory / "embedded"
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype=dtype, release=release)), checkpoint, force=True)
    build_engine(checkpoint, _LIMITS, embedded, force=True)
    return checkpoint, embedded


def _build_tensorrt(host: Host, checkpoint: Path, watch: Watch) -> Path:
    engine = checkpoint.with_name("tensorrt_llm")
    recipe = _LIMITS.model_copy(update={"backend": "tensorrt_llm"})
    build_engine(checkpoint, recipe, engine, force=True, host=host, watch=watch)
    return engine


def _run_embedded(engine: Path, prompts: list[list[int]], config: ExecutorConfig) -> list[list[int]]:
    requests = [
        Request(id=str(index), input_token_ids=tuple(prompt), max_tokens=MAX_TOKENS)
        for index, prompt in enumerate(prompts)
    ]
    with Executor(engine, config) as executor:
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

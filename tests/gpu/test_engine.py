"""The engine on a card against the engine on CPU, token for token, in every way that it can run."""

from __future__ import annotations

import json
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import HELDOUT, MODEL
from trtqwen.diagnostics import EngineError
from trtqwen.engine.builder import build_engine
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import GuidedDecodingParams, OutputConfig, Request, Response, SamplingConfig
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import CheckpointRecipe, EngineRecipe

ANSWER = 24
MakeEngine = Callable[..., Path]
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    """32 prompts of 1 to 200 tokens in four languages, half of them as chat."""
    tokenizer = Tokenizer(MODEL)
    lines = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    chosen = []
    for language in ("en", "zh", "ja", "code"):
        text = "\n".join(line["text"] for line in lines if line["lang"] == language)
        for index, length in enumerate([1, 2, 15, 16, 17, 40, 90, 200]):
            part = text[index * 997 : index * 997 + 900]
            ids = tokenizer.encode("<|im_start|>user\n" + part if index % 2 else part)
            chosen.append(tuple(ids[:length]))
    return chosen


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> MakeEngine:
    """Builds the bundled model's engine in a precision, once."""
    home = tmp_path_factory.mktemp("engines")

    def make(name: str = "float32", max_num_tokens: int = 512, **settings: Any) -> Path:
        checkpoint, engine = home / f"{name}-checkpoint", home / f"{name}-{max_num_tokens}"
        if not checkpoint.exists():
            chosen = CheckpointRecipe(**({"dtype": "float32"} | settings))
            run_conversion(plan_conversion(MODEL, chosen), checkpoint, force=True)
        if not engine.exists():
            limits = EngineRecipe(
                backend="torch",
                max_batch_size=16,
                max_num_tokens=max_num_tokens,
                max_seq_len=512,
                tokens_per_block=16,
            )
            build_engine(checkpoint, limits, engine)
        return engine

    return make


def ask(prompts: Sequence[tuple[int, ...]], max_tokens: int = ANSWER, **options: Any) -> list[Request]:
    return [
        Request(id=str(index), input_token_ids=prompt, max_tokens=max_tokens, **options)
        for index, prompt in enumerate(prompts)
    ]


def tokens(answers: list[list[Response]]) -> list[tuple[int, ...]]:
    assert all(answer[-1].error is None for answer in answers), answers
    return [tuple(token for response in answer for token in response.token_ids) for answer in answers]


@pytest.fixture(scope="module")
def expected(make_engine: MakeEngine, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    with Executor(make_engine(), ExecutorConfig(device="cpu")) as executor:
        return tokens(executor.generate(ask(prompts)))


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "graphs, overlapped": (512, {}),
    "eager, synchronous": (512, {"cuda_graphs": False, "overlap": False}),
    "graphs, synchronous": (512, {"overlap": False}),
    "plain operators": (512, {"attention": "plain"}),
    "chunked, waiting": (48, {"max_tokens_in_paged_kv_cache": 512}),
    "chunked, pausing": (
        48,
        {"batch_scheduler_policy": "max_utilization", "max_tokens_in_paged_kv_cache": 512},
    ),
    "reuse": (512, {"enable_kv_cache_reuse": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_float32_answers_as_on_cpu(
    make_engine: MakeEngine, prompts: list[tuple[int, ...]], expected: list[tuple[int, ...]], way: str
) -> None:
    max_num_tokens, options = WAYS[way]
    with Executor(make_engine(max_num_tokens=max_num_tokens), ExecutorConfig(device="cuda", **options)) as executor:
        for _ in range(1 + (way == "reuse")):
            answers = tokens(executor.generate(ask(prompts)))
        stats = executor.stats()
    assert answers == expected
    assert stats.used_blocks == 0
    assert (stats.paused > 0) == (way == "chunked, pausing")
    assert (stats.reused_blocks > 0) == (way == "reuse")


@pytest.mark.parametrize("overlap", [False, True])
def test_sampled_answers_are_those_of_the_cpu(
    make_engine: MakeEngine, prompts: list[tuple[int, ...]], overlap: bool
) -> None:
    """Temperature, filters, penalties and seeds; a difference in the last bits may turn a draw, but rarely."""
    samplings = [
        SamplingConfig(temperature=0.6, top_p=1.0, seed=3),
        SamplingConfig(temperature=0.9, top_p=0.8, top_k=20, seed=4),
        SamplingConfig(top_k=5, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1, seed=5),
        SamplingConfig(min_p=0.05, temperature=1.2, seed=6),
    ]
    requests = [
        Request(id=str(index), input_token_ids=prompt, max_tokens=ANSWER, sampling=samplings[index % 4])
        for index, prompt in enumerate(prompts)
    ]
    answers = []
    for config in (ExecutorConfig(device="cpu"), ExecutorConfig(device="cuda", overlap=overlap)):
        with Executor(make_engine(), config) as executor:
            answers.append(tokens(executor.generate(requests)))
    alike = sum(one == other for one, other in zip(*answers, strict=True))
    assert alike >= len(prompts) - 1


PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "float16": ({"dtype": "float16"}, 5e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 4e-2),
    "weight-only sm80": ({"dtype": "float16", "quant": "int8_wo", "int8_layout": "sm80"}, 5e-3),
    "weight-only plain": ({"dtype": "bfloat16", "quant": "int8_wo"}, 4e-2),
    "smoothquant static": ({"dtype": "float16", "quant": "int8_sq"}, 6e-2),
    "smoothquant per token and channel": (
        {"dtype": "float16", "quant": "int8_sq", "per_token": True, "per_channel": True},
        6e-2,
    ),
    "int8 kv cache": ({"dtype": "float16", "kv_cache": "int8"}, 4e-2),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_are_close_to_the_cpus(
    make_engine: MakeEngine, prompts: list[tuple[int, ...]], precision: str
) -> None:
    """Logits of every prompt token, by relative distance; the CPU computes the same checkpoint in float32."""
    settings, bound = PRECISIONS[precision]
    requests = ask(prompts[3:8], 2, output=OutputConfig(return_context_logits=True))
    found = []
    for device in ("cpu", "cuda"):
        with Executor(make_engine(precision, **settings), ExecutorConfig(device=device)) as executor:
            answers = executor.generate(requests)
        found.append([np.frombuffer(answer[0].context_logits or b"", np.float32) for answer in answers])
    for one, other in zip(*found, strict=True):
        assert np.linalg.norm(one - other) / np.linalg.norm(one) < bound


@pytest.mark.parametrize("overlap", [False, True])
def test_guided_answers_have_their_form(
    make_engine: MakeEngine, prompts: list[tuple[int, ...]], overlap: bool
) -> None:
    pytest.importorskip("xgrammar")
    guide = GuidedDecodingParams(guide_type="regex", guide="[0-9]{3}-[0-9]{4}")
    with Executor(make_engine(), ExecutorConfig(device="cuda", overlap=overlap)) as executor:
        answers = executor.generate([*ask(prompts[:4]), Request(
            id="guided", input_token_ids=prompts[5], max_tokens=20, guided_decoding=guide
        )])  # fmt: skip
    text = Tokenizer(MODEL).decode(list(tokens(answers)[-1]))
    assert len(text) == 8
    assert text[3] == "-"


def test_cancelled_requests_free_their_blocks_at_once(
    make_engine: MakeEngine, prompts: list[tuple[int, ...]]
) -> None:
    with Executor(make_engine(), ExecutorConfig(device="cuda")) as executor:
        events: queue.Queue[Response] = queue.Queue()
        for request in ask(prompts[3:11], 400, end_id=None):
            executor.submit(request, events.put)
        running: set[str] = set()
        while len(running) < 8:
            running.add(events.get(timeout=60).request_id)
        for name in running:
            executor.cancel(name)
        begin = time.monotonic()
        while executor.stats().used_blocks:
            assert time.monotonic() - begin < 60
        print(f"blocks free after {1000 * (time.monotonic() - begin):.1f} ms")


def test_what_does_not_fit_the_card_is_named(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    share = 4e6 / torch.cuda.mem_get_info()[1]  # less than the weights
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"per_process_memory_fraction:{share:.7f}")
    with pytest.raises(EngineError, match=r"the weights do not fit cuda:0, where .* GiB were free"):
        Executor(make_engine(), ExecutorConfig(device="cuda"))


def cards(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA devices")


@pytest.mark.parametrize("tp_size", [pytest.param(2, marks=cards(2)), pytest.param(4, marks=cards(4))])
def test_several_cards_answer_as_one(
    make_engine: MakeEngine, prompts: list[tuple[int, ...]], expected: list[tuple[int, ...]], tp_size: int
) -> None:
    with Executor(make_engine(f"float32-tp{tp_size}", tp_size=tp_size), ExecutorConfig(device="cuda")) as executor:
        for _ in range(3):
            assert tokens(executor.generate(ask(prompts))) == expected


@cards(2)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_engine(make_engine: MakeEngine, prompts: list[tuple[int, ...]], rank: int) -> None:
    with Executor(make_engine("float32-tp2", tp_size=2), ExecutorConfig(device="cuda")) as executor:
        events: queue.Queue[Response] = queue.Queue()
        executor.submit(ask(prompts[4:5], 400, end_id=None)[0], events.put)
        events.get(timeout=60)
        os.kill(executor._processes[rank].pid, signal.SIGKILL)
        while (response := events.get(timeout=10)).finish_reason is None:
            pass
        assert "the engine has stopped" in (response.error or "")
        for process in executor._processes:
            process.wait(timeout=10)

"""The executor against transformers, token for token, and its behavior under load, cancellation and death."""

from __future__ import annotations

import json
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.models import bundled_model
from tests.slow import slow
from trtqwen.demo import HELDOUT, MODEL
from trtqwen.diagnostics import EngineError, InputError
from trtqwen.engine.builder import build_engine
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import FinishReason, Request, Response, SamplingConfig
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import EngineRecipe

ANSWER = 8
MakeEngine = Callable[..., Path]


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    """32 prompts of 1 to 200 tokens in English, Chinese, Japanese and code, half of them as chat."""
    tokenizer = Tokenizer(MODEL)
    lines = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    lengths = [1, 2, 15, 16, 17, 40, 90, 200]
    chosen = []
    for language in ("en", "zh", "ja", "code"):
        text = "\n".join(line["text"] for line in lines if line["lang"] == language)
        for index, length in enumerate(lengths):
            part = text[index * 997 : index * 997 + 900]
            ids = tokenizer.encode("<|im_start|>user\n" + part if index % 2 else part)
            chosen.append(tuple(ids[:length]))
    assert len({*chosen}) >= 28  # the chats of one or two tokens are alike
    return chosen


@pytest.fixture(scope="module")
def expected(prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy continuations by transformers in float32, ended by the model's end id."""
    model = bundled_model()
    end_id = Tokenizer(MODEL).end_id
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
        answer = out[0, len(prompt) :].tolist()
        answers.append(tuple(answer[: answer.index(end_id)] if end_id in answer else answer))
    return answers


def ask(prompt: Sequence[int], name: str = "a", max_tokens: int = ANSWER, **options: object) -> Request:
    end_id = Tokenizer(MODEL).end_id
    return Request(id=name, input_token_ids=tuple(prompt), max_tokens=max_tokens, **({"end_id": end_id} | options))  # type: ignore[arg-type]


def tokens(responses: list[Response]) -> tuple[int, ...]:
    return tuple(token for response in responses for token in response.token_ids)


SETTINGS = {
    "at ease": (512, ExecutorConfig()),
    "chunked, waiting": (48, ExecutorConfig(max_tokens_in_paged_kv_cache=320)),
    "chunked, pausing": (
        48,
        ExecutorConfig(batch_scheduler_policy="max_utilization", max_tokens_in_paged_kv_cache=320),
    ),
}


@pytest.mark.parametrize(
    ("tp_size", "setting"),
    [
        (1, "at ease"),
        slow(4, "at ease"),
        slow(2, "chunked, waiting"),
        slow(1, "chunked, pausing"),
        (2, "chunked, pausing"),
    ],
)
def test_greedy_equals_transformers(
    bundled_engine: MakeEngine,
    prompts: list[tuple[int, ...]],
    expected: list[tuple[int, ...]],
    tp_size: int,
    setting: str,
) -> None:
    """Up to 16 at a time, and alone; 48 tokens a step force chunks, 320 tokens of KV cache waiting or pausing."""
    max_num_tokens, config = SETTINGS[setting]
    with Executor(bundled_engine(tp_size, max_num_tokens=max_num_tokens), config) as executor:
        answers = executor.generate([ask(prompt, str(index)) for index, prompt in enumerate(prompts)])
        stats = executor.stats()
        if setting == "at ease":
            alone = range(0, len(prompts), 3 if tp_size == 1 else 5)  # of every language and length
            for index in alone:
                assert tokens(executor.generate([ask(prompts[index])])[0]) == expected[index]
    assert [tokens(answer) for answer in answers] == expected
    assert stats.used_blocks == 0
    assert (stats.max_active == 16) == (setting == "at ease")
    assert (stats.paused > 0) == (setting == "chunked, pausing")


def test_the_plain_attention_answers_alike(
    bundled_engine: MakeEngine,
    prompts: list[tuple[int, ...]],
    expected: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRTQWEN_ATTENTION", "plain")
    with Executor(bundled_engine(1)) as executor:
        answers = executor.generate([ask(prompt, str(index)) for index, prompt in enumerate(prompts[:8])])
    assert [tokens(answer) for answer in answers] == expected[:8]
    monkeypatch.setenv("TRTQWEN_ATTENTION", "fast")
    with pytest.raises(EngineError, match="TRTQWEN_ATTENTION is 'fast'"):
        Executor(bundled_engine(1))


@pytest.fixture(scope="module")
def executor(bundled_engine: MakeEngine) -> Iterator[Executor]:
    with Executor(bundled_engine(2), ExecutorConfig(max_tokens_in_paged_kv_cache=2048)) as running:
        yield running


def test_requests_share_steps(executor: Executor, prompts: list[tuple[int, ...]]) -> None:
    before = executor.stats().iterations
    answers = executor.generate([ask(p[:16], str(i), 40, end_id=None) for i, p in enumerate(prompts[:16])])
    assert all(len(tokens(answer)) == 40 for answer in answers)
    assert executor.stats().iterations - before < 160  # the longest takes 40 steps, their sum is 640
    assert executor.stats().max_active == 16


def test_a_seeded_answer_is_repeatable_alone_and_in_company(
    executor: Executor, prompts: list[tuple[int, ...]]
) -> None:
    def sampled(name: str, seed: int) -> Request:
        return ask(prompts[3], name, sampling=SamplingConfig(top_p=0.95, temperature=1.3, seed=seed), end_id=None)

    alone = tokens(executor.generate([sampled("a", 11)])[0])
    company = executor.generate(
        [sampled("a", 11), sampled("b", 12), *(ask(p, f"c{i}") for i, p in enumerate(prompts))]
    )
    assert tokens(company[0]) == alone
    assert tokens(company[1]) != alone


def test_stop_words_end_an_answer(executor: Executor, prompts: list[tuple[int, ...]]) -> None:
    whole = tokens(executor.generate([ask(prompts[5], end_id=None)])[0])
    word = whole[4:6]
    first = next(i for i in range(len(whole)) if whole[i : i + 2] == word)
    (answer,) = executor.generate([ask(prompts[5], end_id=None, stop_words=(word,))])
    assert tokens(answer) == whole[: first + 2]
    assert answer[-1].finish_reason is FinishReason.STOP_WORDS


def test_a_bad_request_fails_alone(executor: Executor, prompts: list[tuple[int, ...]]) -> None:
    requests = [ask(prompts[2], "good"), ask([1] * 512, "long"), ask([99999], "alien")]
    good, long, alien = executor.generate(requests)
    assert good[-1].finish_reason in (FinishReason.LENGTH, FinishReason.END_ID)
    assert long[-1].error is not None
    assert "Prompt length (512) exceeds maximum input length (511)" in long[-1].error
    assert alien[-1].error is not None
    assert "outside the vocabulary" in alien[-1].error
    assert executor.stats().used_blocks == 0


def test_cancelling_frees_the_blocks(executor: Executor, prompts: list[tuple[int, ...]]) -> None:
    events: queue.Queue[Response] = queue.Queue()
    for name in ("a", "b"):
        executor.submit(ask(prompts[4], name, 400, end_id=None), events.put)
    while events.get(timeout=60).request_id != "b":
        pass
    executor.cancel("a")
    executor.cancel("b")
    executor.cancel("unknown")
    ends: set[str] = set()
    while len(ends) < 2:
        response = events.get(timeout=60)
        if response.finish_reason is not None:
            assert response.finish_reason is FinishReason.CANCELLED
            ends.add(response.request_id)
    assert executor.stats().used_blocks == 0
    assert executor.stats().active == 0


def test_an_id_in_flight_is_refused(executor: Executor, prompts: list[tuple[int, ...]]) -> None:
    events: queue.Queue[Response] = queue.Queue()
    executor.submit(ask(prompts[4], "twin", 100, end_id=None), events.put)
    with pytest.raises(EngineError, match="'twin' is in flight already"):
        executor.submit(ask(prompts[4], "twin"), events.put)
    executor.cancel("twin")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_every_request(
    bundled_engine: MakeEngine, prompts: list[tuple[int, ...]], rank: int
) -> None:
    with Executor(bundled_engine(2)) as executor:
        events: queue.Queue[Response] = queue.Queue()
        executor.submit(ask(prompts[4], "a", 400, end_id=None), events.put)
        events.get(timeout=60)
        pids = [process.pid for process in executor._processes]
        os.kill(pids[rank], signal.SIGKILL)
        while (response := events.get(timeout=60)).finish_reason is None:
            pass
        assert response.error is not None
        assert "the engine has stopped" in response.error
        with pytest.raises(EngineError, match="the engine has stopped"):
            executor.submit(ask(prompts[4], "b"), events.put)
        with pytest.raises(EngineError, match="the engine has stopped"):
            executor.stats()
        for process in executor._processes:
            process.wait(timeout=60)


def test_a_rank_bounds_the_kernels_that_it_keeps_and_is_quoted_when_it_dies(
    bundled_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, real_ranks: None
) -> None:
    """Without bounds a rank's memory grows with each number of tokens that a step has for the first time."""
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")  # a rank then writes where it was when it aborted
    with Executor(bundled_engine(1)) as executor:
        variables = Path(f"/proc/{executor._processes[0].pid}/environ").read_text().split("\0")
        assert {"LRU_CACHE_CAPACITY=64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY=64"} <= set(variables)
        os.kill(executor._processes[0].pid, signal.SIGABRT)
        with pytest.raises(EngineError, match=r"rank 0 ended with code -6; its last lines: .*\w+.* \| .*\w+"):
            while executor.stats():
                pass


def test_a_damaged_engine_says_so_at_the_start(bundled_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a finished engine"):
        Executor(tmp_path)
    checkpoint = bundled_engine(2).parent / "checkpoint-tp2"
    build_engine(checkpoint, EngineRecipe(backend="torch", max_seq_len=512), tmp_path / "engine")
    rank = tmp_path / "engine" / "rank1.safetensors"
    content = bytearray(rank.read_bytes())
    rank.unlink()  # it is linked to the checkpoint's file
    content[8:12] = b"oops"
    rank.write_bytes(content)
    with pytest.raises(InputError, match=r"rank1\.safetensors has other bytes than were written"):
        Executor(tmp_path / "engine")

"""What a request may ask for besides tokens, on two running ranks: logits against transformers, guides, reuse."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import bundled_model
from trtqwen.demo import MODEL
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import (
    FinishReason,
    GuidedDecodingParams,
    OutputConfig,
    Request,
    Response,
    SamplingConfig,
)
from trtqwen.hf.tokenizer import Tokenizer

PROMPT = "The capital of France is a city on the river, and in the morning it is quiet."
EVERYTHING = OutputConfig(
    return_log_probs=True, return_context_logits=True, return_generation_logits=True, return_perf_metrics=True
)


@pytest.fixture(scope="module")
def executor(bundled_engine: Callable[..., Path]) -> Iterator[Executor]:
    """Two ranks, with reuse; 16 tokens a step make chunks of every longer prompt."""
    config = ExecutorConfig(enable_kv_cache_reuse=True, max_tokens_in_paged_kv_cache=1024)
    with Executor(bundled_engine(2, max_num_tokens=16), config) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


def ask(ids: Sequence[int], name: str = "a", max_tokens: int = 12, **options: object) -> Request:
    return Request(id=name, input_token_ids=tuple(ids), max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def tokens(responses: list[Response]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def rows(data: bytes | None) -> torch.Tensor:
    assert data is not None
    return torch.from_numpy(np.frombuffer(data, np.float32).reshape(-1, 4096).copy())


def test_log_probs_and_logits_are_those_of_transformers(executor: Executor, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT)
    assert len(prompt) > 16
    [answer] = executor.generate([ask(prompt, output=EVERYTHING, sampling=SamplingConfig(temperature=3, top_p=0.9))])
    ids = tokens(answer)
    model = bundled_model()
    with torch.inference_mode():
        expected = model(torch.tensor([[*prompt, *ids]])).logits[0]
    context = rows(answer[0].context_logits)
    torch.testing.assert_close(context, expected[: len(prompt)], rtol=1e-3, atol=1e-3)
    assert all(response.context_logits is None for response in answer[1:])
    chosen = torch.cat([rows(response.generation_logits) for response in answer])
    torch.testing.assert_close(chosen, expected[len(prompt) - 1 : -1], rtol=1e-3, atol=1e-3)
    log_probs = [log_prob for response in answer for log_prob in response.log_probs]
    own = expected[len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(ids)), ids]
    torch.testing.assert_close(torch.tensor(log_probs), own, rtol=1e-3, atol=1e-3)


def test_times_are_in_order_and_blocks_add_up(executor: Executor, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Once more: " + PROMPT)
    blocks = (len(prompt) - 1) // 16
    output = OutputConfig(return_perf_metrics=True)
    for reused in (0, blocks):
        [answer] = executor.generate([ask(prompt, output=output)])
        assert all(response.perf_metrics is None for response in answer[:-1])
        metrics = answer[-1].perf_metrics
        assert metrics is not None
        assert metrics.kv_cache_reused_blocks == reused
        assert metrics.kv_cache_alloc_total_blocks == metrics.kv_cache_alloc_new_blocks + reused == blocks + 1
        assert (
            0
            < metrics.arrival_time_ns
            < metrics.first_scheduled_time_ns
            < metrics.first_token_time_ns
            < metrics.last_token_time_ns
        )


def test_reuse_changes_no_token(
    executor: Executor, bundled_engine: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    """Conversations that share a long beginning, each with a second turn, one after another and all at once."""
    beginning = tokenizer.encode("<|im_start|>system\n" + PROMPT * 3)
    ends = [tokenizer.encode(f"<|im_start|>user\n{text}") for text in ("你好", "Hello", "1 + 1 =", "東京")]
    first = [[*beginning, *end] for end in ends]
    with Executor(bundled_engine(2, max_num_tokens=16), ExecutorConfig()) as plain:
        expected = [tokens(plain.generate([ask(prompt)])[0]) for prompt in first]
        second = [[*prompt, *answer, *ends[0]] for prompt, answer in zip(first, expected, strict=True)]
        expected += [tokens(plain.generate([ask(prompt)])[0]) for prompt in second]
        assert plain.stats().reused_blocks == 0
    before = executor.stats().reused_blocks
    assert [tokens(executor.generate([ask(prompt)])[0]) for prompt in first + second] == expected
    together = executor.generate([ask(prompt, str(index)) for index, prompt in enumerate(first + second)])
    assert [tokens(answer) for answer in together] == expected
    assert executor.stats().reused_blocks - before > 80
    assert executor.stats().used_blocks == 0


def test_guided_answers_are_valid_beside_free_ones(executor: Executor, tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "size": {"type": "integer", "maximum": 99}},
        "required": ["city", "size"],
    }
    params = GuidedDecodingParams(guide_type="json_schema", guide=json.dumps(schema))
    prompt = tokenizer.encode(PROMPT)
    guided = [
        ask(prompt, f"g{seed}", 200, guided_decoding=params, sampling=SamplingConfig(top_p=1.0, seed=seed))
        for seed in range(3)
    ]
    free = ask(prompt, "free", 40)
    alone = tokens(executor.generate([free])[0])
    *answers, other = executor.generate([*guided, free])
    assert tokens(other) == alone
    for answer in answers:
        value = json.loads(tokenizer.decode(tokens(answer)))
        assert set(value) == {"city", "size"}
        assert answer[-1].finish_reason is FinishReason.END_ID
    assert len({tuple(tokens(answer)) for answer in answers}) > 1


def test_a_guide_that_cannot_be_compiled_fails_alone(executor: Executor, tokenizer: Tokenizer) -> None:
    params = GuidedDecodingParams(guide_type="regex", guide="((")
    prompt = tokenizer.encode("Hello")
    bad, good = executor.generate([ask(prompt, "bad", guided_decoding=params), ask(prompt, "good")])
    assert bad[-1].error is not None
    assert bad[-1].error.startswith("guided_decoding_guide: is not a usable regex")
    assert len(tokens(good)) == 12


def test_a_request_may_leave_while_its_guide_is_compiled(executor: Executor, tokenizer: Tokenizer) -> None:
    """Many bounded strings take xgrammar seconds; meanwhile others are served."""
    properties = {f"p{index}": {"type": "string", "maxLength": index + 30} for index in range(60)}
    guide = json.dumps({"type": "object", "properties": properties})
    params = GuidedDecodingParams(guide_type="json_schema", guide=guide)
    events: queue.Queue[Response] = queue.Queue()
    executor.submit(ask(tokenizer.encode("Hello"), "slow", guided_decoding=params), events.put)
    [answer] = executor.generate([ask(tokenizer.encode("Hello"), "quick")])
    assert len(tokens(answer)) == 12
    assert executor.stats().waiting == 1
    executor.cancel("slow")
    assert events.get(timeout=60).finish_reason is FinishReason.CANCELLED
    assert executor.stats().waiting == 0


def test_cancelled_requests_with_large_guides_do_not_keep_others_waiting(
    executor: Executor, tokenizer: Tokenizer
) -> None:
    """What has begun to compile ends at its limit, and the rest never begins: 100 of them would take minutes."""
    prompt, large = tokenizer.encode("Hello"), [f"large{number}" for number in range(100)]
    cancelled: queue.Queue[Response] = queue.Queue()
    for name in large:
        properties = {f"{name}_{index}": {"type": "string"} for index in range(1500)}
        guide = json.dumps({"type": "object", "properties": properties})
        params = GuidedDecodingParams(guide_type="json_schema", guide=guide)
        executor.submit(ask(prompt, name, guided_decoding=params), cancelled.put)
    for name in large:
        executor.cancel(name)
    assert {cancelled.get(timeout=60).finish_reason for _ in large} == {FinishReason.CANCELLED}
    begun = time.monotonic()
    params = GuidedDecodingParams(guide_type="regex", guide="yes|no")
    [answer] = executor.generate([ask(prompt, "small", guided_decoding=params)])
    assert tokenizer.decode(tokens(answer)) in ("yes", "no")
    assert time.monotonic() - begun < 30


def test_bad_words_and_biases_reach_the_sampler(executor: Executor, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PROMPT)
    plain = tokens(executor.generate([ask(prompt)])[0])
    [answer] = executor.generate([ask(prompt, bad_words=((plain[0],),), embedding_bias={plain[1]: float("-inf")})])
    assert not {plain[0], plain[1]} & set(tokens(answer))

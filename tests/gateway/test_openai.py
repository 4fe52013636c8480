"""The official client against the bundled model: chat, completions, usage, seeds, streams, and what ends them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.conftest import BACKEND
from tests.gateway.conftest import Running, quick_gateway, quick_triton
from tests.gateway.deaths import check_death, process
from tests.models import bundled_model
from tests.waiting import sometimes, wait_for
from trtqwen.artifact.names import tokenizer_directory
from trtqwen.demo import MODEL
from trtqwen.gateway.api.schemas import ChatRequest
from trtqwen.hf.tokenizer import Tokenizer, render_chat
from trtqwen.triton.client import stream

pytestmark = pytest.mark.triton
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0}}


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """Text and finish reason of each choice, and the usage."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    for chunk in chunks:
        usage = usage or chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


@pytest.mark.parametrize("prompt", ["你好", "Hello!", "🐱是什么意思？", "こんにちは"])
def test_a_streamed_answer_is_the_unstreamed_one(live: Running, prompt: str) -> None:
    whole = live.chat(prompt, max_tokens=24, **GREEDY)
    chunks = live.chat(prompt, max_tokens=24, stream=True, stream_options={"include_usage": True}, **GREEDY)
    texts, reasons, usage = streamed(chunks)
    [choice] = whole.choices
    assert texts == {0: choice.message.content}
    assert reasons == {0: choice.finish_reason}
    assert usage == whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_answer_is_the_ensemble_s(live: Running) -> None:
    """The same as Triton's own text models make of the same prompt."""
    tokenizer = Tokenizer(tokenizer_directory(live.repository))
    assert tokenizer.chat_template
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    prompt = render_chat(tokenizer.chat_template, messages)
    pieces = list(stream(live.triton.grpc_url, prompt, 24, chat=False))
    answer = live.chat("", messages=messages, max_tokens=24, **GREEDY)
    assert answer.choices[0].message.content == "".join(piece.text for piece in pieces)
    assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt))
    assert answer.usage.completion_tokens == sum(piece.num_tokens for piece in pieces)


def test_limits_and_ends_are_told(live: Running) -> None:
    short = live.chat("Hello!", max_tokens=3, **GREEDY)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 3
    newer = live.chat("Hello!", max_completion_tokens=2, **GREEDY)
    assert newer.usage.completion_tokens == 2
    whole = live.chat("Hello!", max_tokens=100, **GREEDY)
    assert whole.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in whole.choices[0].message.content
    forever = live.chat("Hello!", max_tokens=60, temperature=0, extra_body={"ignore_eos": True})
    assert forever.usage.completion_tokens == 60


def test_seeds_decide_and_are_told(live: Running) -> None:
    options = {"max_tokens": 24, "temperature": 1.5, "top_p": 1.0, "extra_body": {"top_k": 0, "ignore_eos": True}}
    first = live.chat("Hello!", **options)
    again = live.chat("Hello!", seed=first.seed, **options)
    other = live.chat("Hello!", seed=first.seed + 1, **options)
    text = first.choices[0].message.content
    assert again.choices[0].message.content == text
    assert other.choices[0].message.content != text
    chunks = list(live.chat("Hello!", seed=first.seed, stream=True, **options))
    assert chunks[0].seed == first.seed
    assert streamed(chunks)[0] == {0: text}
    assert live.chat("Hello!", seed=-5, **options).seed == -5


def test_several_answers_differ_and_the_first_is_the_single_one(live: Running) -> None:
    extra = {"top_k": 0, "ignore_eos": True}
    options = {"max_tokens": 24, "seed": 11, "temperature": 2, "top_p": 1.0, "extra_body": extra}
    single = live.chat("Hello!", **options).choices[0].message.content
    several = live.chat("Hello!", n=4, **options)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert texts[0] == single
    assert len(set(texts)) == 4
    streams, reasons, _ = streamed(live.chat("Hello!", n=4, stream=True, **options))
    assert streams == dict(enumerate(texts))
    assert len(reasons) == 4


def test_stop_strings_end_an_answer_across_tokens(live: Running) -> None:
    whole = live.chat("Hello!", max_tokens=24, **GREEDY).choices[0].message.content
    middle = len(whole) // 2
    stop = whole[middle : middle + 5]
    for streaming in (False, True):
        answer = live.chat("Hello!", max_tokens=24, stop=[stop, "nowhere"], stream=streaming, **GREEDY)
        texts, reasons, _ = (
            streamed(answer) if streaming else ({0: answer.choices[0].message.content}, {0: "stop"}, None)
        )
        assert texts == {0: whole[: whole.index(stop)]}
        assert reasons == {0: "stop"}
    assert wait_for(lambda: live.used_blocks() == 0)


@pytest.fixture(scope="module")
def greedy() -> Callable[[str, int], list[tuple[int, float]]]:
    """What `transformers` finds most probable after a prompt: tokens, and the logarithms of their probabilities."""
    model = bundled_model()
    tokenizer = Tokenizer(MODEL)

    def run(prompt: str, count: int) -> list[tuple[int, float]]:
        ids, found = tokenizer.encode(prompt), []
        for _ in range(count):
            with torch.no_grad():
                value, token = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
            ids.append(int(token))
            found.append((int(token), float(value)))
        return found

    return run


def test_log_probs_are_the_model_s(live: Running, greedy: Callable[[str, int], list[tuple[int, float]]]) -> None:
    tokenizer = Tokenizer(MODEL)
    assert tokenizer.chat_template
    prompt = render_chat(tokenizer.chat_template, [{"role": "user", "content": "你好"}])
    expected = greedy(prompt, 10)
    texts = [tokenizer.token_bytes[token] for token, _ in expected]
    values = pytest.approx([value for _, value in expected], abs=2e-4)
    options: dict[str, Any] = {"max_tokens": 10, "logprobs": True, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True, "repetition_penalty": 1.0}
    [choice] = live.chat("你好", **options).choices
    chunks = [choice for chunk in live.chat("你好", stream=True, **options) for choice in chunk.choices]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    for entries in (choice.logprobs.content, streamed):
        assert [bytes(entry.bytes) for entry in entries] == texts
        assert [entry.logprob for entry in entries] == values
    del options["logprobs"]
    completion = live.client.completions.create(model="qwen", prompt=prompt, logprobs=0, **options)
    assert completion.choices[0].logprobs.token_logprobs == values


def test_the_likeliest_tokens_are_the_model_s(live: Running) -> None:
    tokenizer = Tokenizer(MODEL)
    assert tokenizer.chat_template
    prompt = tokenizer.encode(render_chat(tokenizer.chat_template, [{"role": "user", "content": "你好"}]))
    model = bundled_model()
    options: dict[str, Any] = {"max_tokens": 6, "logprobs": True, "top_logprobs": 5, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True, "repetition_penalty": 1.0}
    for streaming in (False, True):
        answer = live.chat("你好", stream=streaming, **options)
        choices = [choice for chunk in (answer if streaming else [answer]) for choice in chunk.choices]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert len(entries) == 6
        ids = list(prompt)
        for entry in entries:
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
            texts = [tokenizer.token_bytes[token] for token in expected.indices.tolist()]
            assert [bytes(top.bytes) for top in entry.top_logprobs] == texts
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx(expected.values.tolist(), abs=2e-4)
            ids.append(int(expected.indices[0]))


def test_a_bias_bans_and_forces_tokens(live: Running) -> None:
    tokenizer = Tokenizer(MODEL)
    banned = live.chat("Hello!", max_tokens=1, logprobs=True, **GREEDY).choices[0].logprobs.content[0]
    token = tokenizer.token_bytes.index(bytes(banned.bytes))
    other = live.chat("Hello!", max_tokens=1, logprobs=True, logit_bias={token: -100}, **GREEDY)
    assert other.choices[0].logprobs.content[0].bytes != banned.bytes
    [forced] = tokenizer.encode("7")
    sampled = live.chat("Hello!", max_tokens=5, temperature=1, seed=3, logit_bias={forced: 100})
    assert sampled.choices[0].message.content == "77777"
    options = {"model": "qwen", "prompt": "Hello", "max_tokens": 5, "logit_bias": {str(forced): 100}}
    assert live.client.completions.create(**options).choices[0].text == "77777"


def test_completions_take_prompts_as_they_are(live: Running) -> None:
    options = {"model": "qwen", "max_tokens": 6, **GREEDY}
    tokenizer = Tokenizer(tokenizer_directory(live.repository))
    texts = ["Hello", "你好"]
    separate = [live.client.completions.create(prompt=text, **options).choices[0].text for text in texts]
    together = live.client.completions.create(prompt=texts, n=2, **options)
    assert [choice.text for choice in together.choices] == [separate[0]] * 2 + [separate[1]] * 2
    assert together.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)
    ids = live.client.completions.create(prompt=tokenizer.encode("Hello"), **options)
    assert ids.choices[0].text == separate[0]
    echoed = live.client.completions.create(prompt="Hello", echo=True, **options)
    assert echoed.choices[0].text == "Hello" + separate[0]
    chunks = list(live.client.completions.create(prompt="Hello", stream=True, echo=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello" + separate[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    default = live.client.completions.create(model="qwen", prompt="Hello", extra_body={"ignore_eos": True})
    assert default.usage.completion_tokens == 16


def test_the_model_is_listed(live: Running) -> None:
    [model] = live.client.models.list().data
    assert model.id == "qwen"
    assert live.client.models.retrieve("qwen").id == "qwen"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        live.client.models.retrieve("other")


def test_sixty_four_streams_at_once(live: Running) -> None:
    """More than the batch and its queue hold: a retrying client sees every one of them answered."""

    async def run() -> list[str]:
        client: Any = openai.AsyncOpenAI(base_url=f"{live.gateway.url}/v1", api_key="none", max_retries=8, timeout=60)

        async def one(number: int) -> str:
            stream = await client.chat.completions.create(
                model="qwen",
                messages=[{"role": "user", "content": "Hello!"}],
                max_tokens=4 + number % 8,
                stream=True,
                **GREEDY,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(one(number) for number in range(64)))

    texts = asyncio.run(run())
    whole = live.chat("Hello!", max_tokens=11, **GREEDY).choices[0].message.content
    assert all(text and whole.startswith(text) for text in texts)
    assert len(Counter(texts)) == 8
    assert wait_for(lambda: live.used_blocks() == 0)
    assert live.metric("trtqwen_gateway_in_flight") == live.metric("trtqwen_gateway_queued") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(live: Running, stream: bool) -> None:
    body = {
        "model": "qwen",
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 450,
        "ignore_eos": True,
        "stream": stream,
        "n": 2,
    }
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    def leave() -> bool:
        before = live.metric("trtqwen_gateway_refused_total")
        with live.connect() as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            seen = wait_for(lambda: live.used_blocks() > 0, 5)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert wait_for(lambda: live.used_blocks() == 0)
        assert wait_for(lambda: live.metric("trtqwen_gateway_in_flight") == 0)
        return seen and live.metric("trtqwen_gateway_refused_total") == before + 1

    assert sometimes(leave)


def test_plain_generation_answers_as_triton_does(live: Running) -> None:
    body = {"text_input": "Hello", "max_tokens": 6, "id": "mine"}
    status, _, text = live.post("/generate", body)
    assert status == 200
    whole = json.loads(text)
    assert (whole["id"], whole["model_name"], whole["model_version"]) == ("mine", "qwen", "1")
    assert (
        whole["text_output"]
        == live.client.completions.create(model="qwen", prompt="Hello", max_tokens=6, **GREEDY).choices[0].text
    )
    _, headers, text = live.post("/generate_stream", body)
    assert headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    echoed = json.loads(live.post("/generate", body | {"exclude_input_in_output": False})[2])
    assert echoed["text_output"] == "Hello" + whole["text_output"]


ERRORS = [
    ({"max_tokens": 5000}, "context_length_exceeded", "max_tokens", "ask for 489 or fewer"),
    (
        {"messages": [{"role": "user", "content": "word " * 600}]},
        "context_length_exceeded",
        None,
        "length is 512 tokens",
    ),
    ({"messages": []}, "invalid_value", "messages", "at least 1"),
    ({"temperature": 3}, "invalid_value", "temperature", "less than or equal to 2"),
    ({"temperature": "0.5"}, "invalid_value", "temperature", "valid number"),
    ({"n": 17}, "invalid_value", "n", "16 answers"),
    ({"stop": ""}, "invalid_value", "stop", "at least 1 character"),
    ({"logit_bias": {"4096": 1}}, "invalid_value", "logit_bias", "outside the vocabulary of 4096"),
    ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5", "less than or equal to 100"),
    ({"logit_bias": {"-1": 1}}, "invalid_value", None, "match pattern"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported", "tools", "no place for tools"),
]


@pytest.mark.parametrize(("change", "code", "param", "text"), ERRORS)
def test_what_cannot_be_done_is_refused(
    live: Running, change: dict[str, Any], code: str, param: str | None, text: str
) -> None:
    body = {"model": "qwen", "messages": [{"role": "user", "content": "Hello!"}]} | change
    status, _, answer = live.post("/v1/chat/completions", body)
    error = json.loads(answer)["error"]
    assert status == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    assert param is None or error["param"] == param
    assert text in error["message"]


def test_neutral_values_of_unsupported_fields_are_accepted(live: Running) -> None:
    answer = live.chat(
        "Hello!", max_tokens=2, logit_bias={}, modalities=["text"], store=False, user="me", metadata={"a": "b"}
    )
    assert answer.choices[0].finish_reason == "length"


def test_null_is_no_value_everywhere(live: Running) -> None:
    body = {"model": "qwen", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
    optional = [name for name in ChatRequest.model_fields if name not in ("model", "messages", "max_tokens")]
    nothing = {**dict.fromkeys(optional), "stream_options": {"include_usage": None, "include_obfuscation": None}}
    assert live.post("/v1/chat/completions", body | nothing)[0] == 200


def test_upstream_s_own_example_is_answered(live: Running) -> None:
    body = {"text_input": "What is machine learning?", "max_tokens": 20, "bad_words": "", "stop_words": ""}
    assert live.post("/generate", body)[0] == 200
    assert live.post("/generate", body | {"bad_words": ["x"]})[0] == 200
    assert live.post("/generate", body | {"beam_width": 2})[0] == 400
    status, _, text = live.post("/generate", body, {"Content-Type": "application/x-www-form-urlencoded"})
    assert (status, "send the header Content-Type: application/json" in text) == (415, True)


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_balancers_may_ask_for_the_head_alone(live: Running, path: str) -> None:
    request = urllib.request.Request(f"{live.gateway.url}{path}", method="HEAD")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_a_client_that_leaves_a_stream_is_counted(live: Running) -> None:
    def counted() -> bool:
        before = live.metric("trtqwen_gateway_refused_total")
        with live.chat("Hello!", max_tokens=400, stream=True, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
        assert wait_for(lambda: live.metric("trtqwen_gateway_in_flight") == 0)
        return live.metric("trtqwen_gateway_refused_total") == before + 1

    assert sometimes(counted)


def test_an_unknown_model_or_route_is_404(live: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'qwen'"):
        live.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert live.post("/v1/embeddings", {})[0] == 404
    assert live.get("/v1/chat/completions")[0] == 405


def test_health_readiness_and_metrics(live: Running) -> None:
    live.chat("Hello!", max_tokens=5, **GREEDY)
    assert live.get("/health")[0] == live.get("/ready")[0] == 200
    assert live.metric("trtqwen_gateway_replica_up") == 1
    for histogram in ("time_to_first_token", "inter_token", "queue", "request"):
        assert live.metric(f"trtqwen_gateway_{histogram}_seconds_count") > 0, histogram
    before = live.metric("trtqwen_gateway_output_tokens_total"), live.metric("trtqwen_gateway_prompt_tokens_total")
    answer = live.chat("Hello!", max_tokens=5, **GREEDY)
    # An answer is counted when its stream is closed, which may be just after the client has it.
    after = before[0] + answer.usage.completion_tokens
    assert wait_for(lambda: live.metric("trtqwen_gateway_output_tokens_total") == after)
    assert live.metric("trtqwen_gateway_prompt_tokens_total") == before[1] + answer.usage.prompt_tokens


@pytest.fixture
def doomed(engine_repository: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """A gateway on an engine of its own; vLLM starts slowly, and its server is not needed after this test."""
    if BACKEND != "torch":
        yield request.getfixturevalue("live")
        return
    with quick_triton(engine_repository) as triton, quick_gateway(triton, engine_repository) as running:
        yield running


@pytest.mark.slow
def test_the_death_of_a_rank_is_an_error_for_everybody(doomed: Running) -> None:
    module = {"torch": "trtqwen.executor.worker", "vllm": "vllm.entrypoints.openai.api_server"}[BACKEND]
    rank = process(doomed.triton.vllm_pid or doomed.triton.pid, module)
    check_death(doomed, lambda: os.kill(rank, signal.SIGKILL), text="Hello!", extra_body={"ignore_eos": True})

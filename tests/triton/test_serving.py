"""The live server: the five models behind upstream's contract, over gRPC and HTTP."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.slow import SLOW
from tests.triton.conftest import Call, Reply, id_request, in_threads, metrics, text_request
from tests.waiting import GENEROUS, sometimes, wait_for
from trtqwen.artifact.manifest import write_manifest
from trtqwen.artifact.names import tokenizer_directory
from trtqwen.diagnostics import ServerError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import Request
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.hf.tokenizer import Tokenizer, render_chat
from trtqwen.recipe import ServeRecipe
from trtqwen.triton.client import SamplingOptions, stream
from trtqwen.triton.ports import Ports
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

pytestmark = pytest.mark.triton

USED = "nv_trt_llm_kv_cache_block_metrics/used"
FREE = "nv_trt_llm_kv_cache_block_metrics/free"
STEPS = "nv_trt_llm_general_metrics/iteration_counter"
SCHEDULED = "nv_trt_llm_request_metrics/scheduled"
LONG = "The quick brown fox"  # its greedy answer does not end: no stall is as long, so that pieces stay apart


@pytest.fixture(scope="module")
def tokenizer(repository: Path) -> Tokenizer:
    return Tokenizer(tokenizer_directory(repository))


@pytest.fixture(autouse=True)
def surviving(server: TritonServer) -> Iterator[None]:
    """After a test in which Triton itself crashed: show where, and start it again for the tests that follow."""
    yield
    if crashed(server):
        log = server.log.read_text("utf-8", "replace")
        start_again(server)
        pytest.fail(f"Triton was ended by SIGSEGV:\n{log[-4000:]}")


def crashed(server: TritonServer) -> bool:
    try:
        server.check()
    except ServerError as problem:
        return "Triton was ended by SIGSEGV" in problem.what
    return False


def start_again(server: TritonServer) -> None:
    server.stop(drain=False)
    server.start()
    server.wait_until_ready()


def drain(call: Callable[[], Any]) -> list[Any]:
    return list(call())


def settled_steps(server: TritonServer, before: float) -> float:
    """Steps of the engine since it had taken `before`, once it has taken some and rests."""

    def rests() -> bool:
        first = metrics(server)
        time.sleep(0.3)
        then = metrics(server)
        return first[USED] == then[USED] == 0 and before < first[STEPS] == then[STEPS]

    assert wait_for(rests)
    return metrics(server)[STEPS] - before


def assert_cut_short(server: TritonServer, leave: Callable[[], object]) -> None:
    """Somebody who leaves an answer of 500 tokens ends it in the engine, and its KV cache blocks are free."""

    def cut_short() -> bool:
        before = metrics(server)[STEPS]
        leave()
        return settled_steps(server, before) < 400

    assert sometimes(cut_short)


def post(server: TritonServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as problem:
        return problem.code, problem.read().decode()


DTYPES = {
    **dict.fromkeys(("end_id", "beam_width", "min_tokens", "num_return_sequences"), np.int32),
    **dict.fromkeys(("temperature", "top_p", "runtime_top_p"), np.float32),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), np.float32),
    "seed": np.uint64,
}


def typed(options: dict[str, Any]) -> dict[str, Any]:
    """Python's numbers in the types of the tensors that bear their names."""
    return {name: DTYPES[name](value) if name in DTYPES else value for name, value in options.items()}


def ask(server: TritonServer, *prompts: str | bytes, max_tokens: int = 16, **options: Any) -> list[Reply]:
    return list(Call(server, "ensemble", text_request(*prompts, max_tokens=max_tokens, **typed(options))))


def test_a_carrier_brings_the_tokens_that_the_answers_own_streams_would(server: TritonServer) -> None:
    """The gateway's client asks for sixteen answers at a time; the carrier ends with them, and another one opens."""

    async def answers(replica: Replica, *, carried: bool) -> tuple[list[list[int]], int]:
        """The tokens of the answers, and how many of them a carrier brought."""

        async def one(number: int) -> tuple[list[int], int]:
            found: list[int] = []
            brought = 0
            inputs = id_request([40 + number, 50], 24, streaming=True)
            replies = replica.generate(f"carried-{number}", inputs, GENEROUS, carried=carried)
            async with aclosing(replies):
                async for reply in replies:
                    found += reply.token_ids
                    brought = max(brought, reply.num_tokens - len(reply.token_ids))
            return found, brought

        found = await asyncio.gather(*map(one, range(16)))
        return [ids for ids, _ in found], sum(brought for _, brought in found)

    async def test() -> None:
        replica = Replica(server.grpc_url)
        plain, none = await answers(replica, carried=False)
        assert none == 0
        for _ in range(2):
            ids, brought = await answers(replica, carried=True)
            assert ids == plain
            assert brought > 0
            await asyncio.sleep(1)  # longer than a carrier waits for another answer
        await replica.close()

    asyncio.run(test())


@pytest.mark.parametrize("model", ["preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls"])
def test_every_model_is_ready(server: TritonServer, model: str) -> None:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/ready") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "prompt", ["你好，请介绍一下自己。", "日本の首都はどこですか？", "🎉🎈😀", "Hello, who are you?"]
)
def test_streamed_text_is_the_unstreamed_text(server: TritonServer, prompt: str) -> None:
    [whole] = ask(server, prompt, max_tokens=32, end_id=-1)
    pieces = ask(server, prompt, max_tokens=32, end_id=-1, stream=True)
    assert whole.final
    assert [reply.final for reply in pieces] == [False] * (len(pieces) - 1) + [True]
    assert whole.text
    assert "".join(reply.text for reply in pieces) == whole.text


def test_streams_break_no_character(server: TritonServer, tokenizer: Tokenizer) -> None:
    prompt = "表情符号🎉🎈😀"
    broken_apart = 0
    for seed in range(3):
        options = {"end_id": -1, "temperature": 2.0, "seed": seed}
        request = id_request(tokenizer.encode(prompt), 40, **typed({**options, "runtime_top_p": 1.0}))
        [whole] = Call(server, "tensorrt_llm", request)
        text = tokenizer.decode(whole.ids)
        streamed = "".join(
            reply.text for reply in ask(server, prompt, max_tokens=40, stream=True, top_p=1.0, **options)
        )
        assert streamed == text
        apart = "".join(tokenizer.decode([token_id]) for token_id in whole.ids)
        broken_apart += apart.count("\ufffd") > text.count("\ufffd")
    assert broken_apart  # else the noise had no character that is split over tokens, and nothing was tested


@pytest.mark.usefixtures("quick_ranks")
def test_tokens_are_the_executors_own(
    server: TritonServer, bundled_engine: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("The capital of France")
    [reply] = Call(server, "tensorrt_llm", id_request(ids, 24))
    with Executor(bundled_engine(), ExecutorConfig()) as executor:
        [responses] = executor.generate([Request(id="x", input_token_ids=tuple(ids), max_tokens=24)])
    assert reply.ids == [token_id for response in responses for token_id in response.token_ids]
    assert reply.outputs["output_ids"].shape == (1, 1, 24)
    assert reply.outputs["sequence_length"].tolist() == [[24]]


def test_sixteen_streams_share_steps(server: TritonServer) -> None:
    prompts = [f"Tell me about the number {number}." for number in range(16)]
    alone = [ask(server, prompt, max_tokens=12, end_id=-1)[0].text for prompt in prompts]
    options = {"max_tokens": 12, "end_id": -1, "stream": True}
    calls: list[Callable[[], Any]] = [partial(ask, server, prompt, **options) for prompt in prompts]

    def shared() -> bool:
        before = metrics(server)[STEPS]
        replies = in_threads(calls)
        assert ["".join(reply.text for reply in stream) for stream in replies] == alone
        steps = settled_steps(server, before)
        assert steps >= 12
        return steps < 16 * 12 / 2

    assert sometimes(shared)


def test_a_request_may_have_several_rows(server: TritonServer) -> None:
    prompts = ["你好", "Hello, who are you?", "日本"]
    alone = [ask(server, prompt, max_tokens=12)[0].text for prompt in prompts]
    whole = ask(server, *prompts, max_tokens=12)
    assert [reply.final for reply in whole] == [False, False, True]
    assert {reply.outputs["batch_index"].item(): reply.text for reply in whole} == dict(enumerate(alone))
    pieces = ask(server, *prompts, max_tokens=12, stream=True)
    assert [reply.final for reply in pieces] == [False] * (len(pieces) - 1) + [True]
    joined = ["", "", ""]
    for reply in pieces:
        joined[reply.outputs["batch_index"].item()] += reply.text
    assert joined == alone


def test_the_prompt_comes_back_where_asked_for(server: TritonServer) -> None:
    [with_prompt] = ask(server, "你好", max_tokens=8, exclude_input_in_output=False)
    [without] = ask(server, "你好", max_tokens=8)
    assert with_prompt.text == "你好" + without.text


def test_stop_words_end_the_answer(server: TritonServer, tokenizer: Tokenizer) -> None:
    prompt = "Hello, who are you?"
    [whole] = Call(server, "tensorrt_llm", id_request(tokenizer.encode(prompt), 24))
    ids = whole.ids
    end = next(
        index
        for index in range(2, len(ids))
        if ids[index] not in ids[:index] and tokenizer.encode(tokenizer.decode([ids[index]])) == [ids[index]]
    )
    request = text_request(prompt, max_tokens=24, **typed({"end_id": -1}))
    request["stop_words"] = np.array([[tokenizer.decode([ids[end]]).encode()]], np.object_)
    [stopped] = Call(server, "ensemble", request)
    assert stopped.text == tokenizer.decode(ids[: end + 1])


def test_a_stop_request_ends_a_stream(server: TritonServer) -> None:
    request = text_request("Hello", max_tokens=500, stream=True, **typed({"end_id": -1}))

    def stop() -> None:
        replies = iter(Call(server, "ensemble", request, "me"))
        next(replies)
        [stopped] = Call(server, "tensorrt_llm", id_request([0], 1, stop=True), "me")
        assert (stopped.error, stopped.outputs, stopped.final) == ("", {}, True)
        *_, last = replies
        assert last.final

    assert_cut_short(server, stop)


def test_stop_without_an_id_is_refused(server: TritonServer) -> None:
    [reply] = Call(server, "tensorrt_llm", id_request([0], 1, stop=True))
    assert reply.error == "Trying to stop a request but request ID is not provided"


def test_a_bad_request_fails_alone(server: TritonServer) -> None:
    cases = {
        "Prompt length": ask(server, "word " * 600),
        "QUERY: byte 0 is not UTF-8": ask(server, b"\xff\xfe"),
        "QUERY: the prompt is empty": ask(server, ""),
        "beam_width: is for beam search": ask(server, "a", beam_width=2),
    }
    for message, [reply] in cases.items():
        assert message in reply.error
        assert "Traceback" not in reply.error
        assert reply.final
    assert ask(server, "你好", max_tokens=4)[0].text


def test_http_generate(server: TritonServer) -> None:
    status, body = post(server, "ensemble/generate", {"text_input": "你好", "max_tokens": 8, "temperature": 0.5})
    reply = json.loads(body)
    assert (status, reply["model_name"]) == (200, "ensemble")
    assert reply["text_output"] == ask(server, "你好", max_tokens=8)[0].text
    status, body = post(server, "ensemble/generate", {"text_input": "word " * 600, "max_tokens": 8})
    assert status == 400
    assert "Prompt length" in json.loads(body)["error"]


def test_http_generate_stream(server: TritonServer) -> None:
    request = {"text_input": LONG, "max_tokens": 100, "stream": True}
    expected = ask(server, LONG, max_tokens=100)[0].text

    def in_pieces() -> bool:
        status, body = post(server, "ensemble/generate_stream", request)
        events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line]
        assert status == 200
        assert "".join(event["text_output"] for event in events) == expected
        return len(events) > 2

    assert sometimes(in_pieces)


def test_token_counts_are_told_where_asked_for(server: TritonServer, tokenizer: Tokenizer) -> None:
    [reply] = ask(
        server, "你好", max_tokens=5, end_id=-1, return_num_input_tokens=True, return_num_output_tokens=True
    )
    assert reply.outputs["num_input_tokens"].item() == len(tokenizer.encode("你好"))
    assert reply.outputs["num_output_tokens"].item() == 5


def test_client_streams_raw_text(server: TritonServer) -> None:
    [whole] = ask(server, LONG, max_tokens=100, return_num_output_tokens=True)

    def in_pieces() -> bool:
        pieces = list(stream(server.grpc_url, LONG, 100, chat=False))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert sum(piece.num_tokens for piece in pieces) == whole.outputs["num_output_tokens"].item()
        return len(pieces) > 1

    assert sometimes(in_pieces)


def test_client_renders_the_models_chat_template(server: TritonServer, tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template is not None
    rendered = render_chat(tokenizer.chat_template, [{"role": "user", "content": "你好"}])
    text = "".join(piece.text for piece in stream(server.grpc_url, "你好", 12))
    assert text == ask(server, rendered, max_tokens=12)[0].text


def test_client_passes_sampling_options(server: TritonServer) -> None:
    def sample(seed: int) -> str:
        options = SamplingOptions(top_p=1.0, temperature=2.0, seed=seed)
        pieces = stream(server.grpc_url, "Hello", 16, sampling=options, chat=False)
        return "".join(piece.text for piece in pieces)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_eight_client_streams_at_once(server: TritonServer) -> None:
    prompts = [f"Question {number}: who are you?" for number in range(8)]

    def tell(prompt: str) -> str:
        return "".join(piece.text for piece in stream(server.grpc_url, prompt, 16, chat=False))

    texts = in_threads([partial(tell, prompt) for prompt in prompts])
    assert texts == [ask(server, prompt, max_tokens=16)[0].text for prompt in prompts]


def test_closing_the_client_early_cancels(server: TritonServer) -> None:
    # Noise: an answer that no end token cuts short.
    sampling = SamplingOptions(top_p=1.0, temperature=2.0, seed=1, min_tokens=400)

    def close() -> None:
        pieces = stream(server.grpc_url, "Hello", 500, chat=False, sampling=sampling)
        next(pieces)
        assert isinstance(pieces, Generator)
        pieces.close()

    assert_cut_short(server, close)


def test_client_errors_are_sentences(server: TritonServer) -> None:
    with pytest.raises(ServerError, match=r"refused the request: .*Prompt length"):
        list(stream(server.grpc_url, "word " * 600, 8))
    with pytest.raises(ServerError, match=r"^127.0.0.1:1: no Triton server answers; start one with `trtqwen serve`"):
        list(stream("127.0.0.1:1", "hi", 8))


def test_penalties_and_min_tokens_change_the_answer(server: TritonServer, tokenizer: Tokenizer) -> None:
    prompt = "The capital of France is"
    [plain] = ask(server, prompt, max_tokens=24, end_id=-1)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        [penalised] = ask(server, prompt, max_tokens=24, end_id=-1, **{name: 1.9})
        assert penalised.error == ""
        assert penalised.text != plain.text
    first = id_request(tokenizer.encode(prompt), 8)
    [answer] = Call(server, "tensorrt_llm", first)
    ending = first | {"end_id": np.array([[answer.ids[0]]], np.int32)}
    [ended] = Call(server, "tensorrt_llm", ending)
    [longer] = Call(server, "tensorrt_llm", ending | {"min_tokens": np.array([[4]], np.int32)})
    assert ended.ids == []
    assert len(longer.ids) >= 4


def texts(replies: list[Reply]) -> str:
    return "".join(reply.text for reply in replies if "text_output" in reply.outputs)


def test_the_program_answers_as_the_ensemble(server: TritonServer) -> None:
    for prompt in ("你好", "Hello, who are you?"):
        request = text_request(prompt, max_tokens=24, **typed({"end_id": -1, "stream": True}))
        expected = "".join(reply.text for reply in Call(server, "ensemble", request))

        def in_pieces(request: dict[str, Any] = request, expected: str = expected) -> bool:
            replies = [reply.text for reply in Call(server, "tensorrt_llm_bls", request)]
            assert "".join(replies) == expected
            return len(replies) > 2

        assert sometimes(in_pieces)
        unstreamed = text_request(prompt, max_tokens=24, **typed({"end_id": -1}))
        assert texts(list(Call(server, "tensorrt_llm_bls", unstreamed))) == "".join(expected)


def test_the_program_serves_many_at_a_time(server: TritonServer) -> None:
    prompts = [f"Tell me about the number {number}." for number in range(8)]
    requests = [text_request(prompt, max_tokens=12, stream=True, **typed({"end_id": -1})) for prompt in prompts]
    alone = [texts(list(Call(server, "tensorrt_llm_bls", request))) for request in requests]
    calls = [partial(Call, server, "tensorrt_llm_bls", request) for request in requests]

    def shared() -> bool:
        before = metrics(server)[STEPS]
        together = in_threads([partial(drain, call) for call in calls])
        assert [texts(replies) for replies in together] == alone
        return settled_steps(server, before) < 8 * 12 / 2

    assert sometimes(shared)


def test_the_programs_clients_may_use_one_id(server: TritonServer) -> None:
    requests = [text_request("Hello", max_tokens=n, stream=True, **typed({"end_id": -1})) for n in (40, 10)]
    alone = [texts(list(Call(server, "tensorrt_llm_bls", request))) for request in requests]
    running = iter(Call(server, "tensorrt_llm_bls", requests[0], "1"))
    first = next(running)
    assert texts(list(Call(server, "tensorrt_llm_bls", requests[1], "1"))) == alone[1]
    assert texts([first, *running]) == alone[0]


def test_a_stop_request_ends_a_stream_of_the_program(server: TritonServer) -> None:
    request = text_request("Hello", max_tokens=500, stream=True, **typed({"end_id": -1}))

    def stop() -> None:
        replies = iter(Call(server, "tensorrt_llm_bls", request, "me"))
        next(replies)
        [stopped] = Call(server, "tensorrt_llm", id_request([0], 1, stop=True), "me")
        assert (stopped.error, stopped.outputs, stopped.final) == ("", {}, True)
        assert not [reply.error for reply in replies if reply.error]

    assert_cut_short(server, stop)


def test_the_program_ends_at_a_stop_word_in_other_tokens(server: TritonServer, tokenizer: Tokenizer) -> None:
    prompt = "Hello, who are you?"
    [whole] = ask(server, prompt, max_tokens=40, end_id=-1)
    word = next(
        word
        for begin in range(4, len(whole.text))
        if (word := whole.text[begin : begin + 4]).isalpha()
        and word not in whole.text[:begin]
        and not whole.text[begin - 1].isspace()
    )
    request = text_request(prompt, max_tokens=40, stream=True, **typed({"end_id": -1}))
    request["stop_words"] = np.array([[word.encode()]], np.object_)
    expected = whole.text[: whole.text.index(word) + 4]
    assert texts(list(Call(server, "ensemble", request))) != expected  # upstream's ids do not see it
    assert texts(list(Call(server, "tensorrt_llm_bls", request))) == expected
    assert wait_for(lambda: metrics(server)[USED] == 0)


@pytest.mark.embedded("vLLM goes on without a guide where it has no token left")
def test_an_error_in_the_middle_of_a_stream_reaches_every_kind_of_client(server: TritonServer) -> None:
    """Guided by one digit and with no end in sight, the second token has nothing to choose from."""
    options = typed({"stream": True, "min_tokens": 5})
    for model in ("ensemble", "tensorrt_llm_bls"):
        request = text_request("1 + 1 =", max_tokens=8, **options)
        request["guided_decoding_guide_type"] = np.array([[b"regex"]], np.object_)
        request["guided_decoding_guide"] = np.array([[b"[0-9]"]], np.object_)
        replies = list(Call(server, model, request, f"fails in {model}"))
        *before, _ = replies
        # An ensemble may drop what is between its models when one of them fails; the program sends each token on.
        assert [reply.text.isdigit() for reply in before] in (
            [[True]] if model == "tensorrt_llm_bls" else [[], [True]]
        )
        assert "no token is left to choose" in replies[-1].error
        assert ask(server, "你好", max_tokens=4)[0].text


def test_bad_words_are_not_said(server: TritonServer, tokenizer: Tokenizer) -> None:
    prompt = "Hello, who are you?"
    [whole] = Call(server, "tensorrt_llm", id_request(tokenizer.encode(prompt), 24))
    words = {token_id: tokenizer.decode([token_id]) for token_id in whole.ids}
    said = next(token_id for token_id, word in words.items() if word.strip() and tokenizer.encode(word) == [token_id])
    request = text_request(prompt, max_tokens=24, **typed({"end_id": -1}))
    request["bad_words"] = np.array([[tokenizer.decode([said]).encode()]], np.object_)
    [reply] = Call(server, "ensemble", request)
    assert reply.text != tokenizer.decode(whole.ids)
    assert said not in tokenizer.encode(reply.text)


@pytest.mark.embedded("vLLM tells no logits and no blocks of a request")
def test_log_probs_logits_and_return_sequences(server: TritonServer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello")
    names = ("return_log_probs", "return_context_logits", "return_generation_logits", "return_perf_metrics")
    options = {"num_return_sequences": 2, "runtime_top_p": 1.0, **dict.fromkeys(names, True)}
    replies = list(Call(server, "tensorrt_llm", id_request(ids, 5, **typed(options))))
    assert [reply.final for reply in replies] == [False, True]
    assert {reply.outputs["sequence_index"].item() for reply in replies} == {0, 1}
    assert replies[0].ids != replies[1].ids
    for reply in replies:
        assert reply.outputs["context_logits"].shape == (1, len(ids), 4096)
        logits = reply.outputs["generation_logits"]
        assert logits.shape == (1, 1, 5, 4096)
        own = logits[0, 0].astype(np.float64)
        log_probs = own[np.arange(5), reply.ids] - np.log(np.exp(own).sum(-1))
        np.testing.assert_allclose(reply.outputs["output_log_probs"][0, 0], log_probs, rtol=1e-4, atol=1e-4)
        assert reply.outputs["cum_log_probs"].item() == pytest.approx(log_probs.sum(), rel=1e-4)
        assert reply.outputs["kv_cache_alloc_total_blocks"].item() == 1


def test_guided_answers_are_json(server: TritonServer) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
    }
    request = text_request("Who are you?", max_tokens=120, stream=True)
    request["guided_decoding_guide_type"] = np.array([[b"json_schema"]], np.object_)
    request["guided_decoding_guide"] = np.array([[json.dumps(schema).encode()]], np.object_)
    value = json.loads(texts(list(Call(server, "ensemble", request))))
    assert set(value) == {"name", "age"}
    request["guided_decoding_guide"] = np.array([[b"{"]], np.object_)
    [reply] = Call(server, "ensemble", request)
    assert "guided_decoding_guide: is not a usable json_schema" in reply.error


def test_a_bias_of_words_changes_the_answer(server: TritonServer) -> None:
    request = text_request("Hello", max_tokens=4, **typed({"end_id": -1}))
    request["embedding_bias_words"] = np.array([[b"!"]], np.object_)
    request["embedding_bias_weights"] = np.array([[1e4]], np.float32)
    [reply] = Call(server, "ensemble", request)
    assert reply.text == "!!!!"


def test_a_bias_of_the_wrong_length_fails_alone(server: TritonServer) -> None:
    """Upstream's engines end every request in flight for it."""
    wrong = id_request([5, 6], 4) | {"embedding_bias": np.zeros((1, 4095), np.float32)}
    right = id_request([5, 6], 60, **typed({"streaming": True}))
    running = iter(Call(server, "tensorrt_llm", right))
    next(running)
    [reply] = Call(server, "tensorrt_llm", wrong)
    assert "embedding_bias: has 4095 values" in reply.error
    assert not [other for other in running if other.error]


@pytest.fixture(scope="module")
def older_server(
    bundled_engine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """In the names of 0.18.2, with four processes for text and reuse of KV cache blocks."""
    home = tmp_path_factory.mktemp("older")
    engine = Path(shutil.copytree(bundled_engine(), home / "engine"))
    config = json.loads((engine / "config.json").read_text("utf-8"))
    (engine / "config.json").write_text(json.dumps(config | {"version": "0.18.2"}), encoding="utf-8")
    (engine / "manifest.json").unlink()
    write_manifest(engine, "engine", {}, {})
    serve = ServeRecipe(postprocessing_instance_count=4, enable_kv_cache_reuse=True)
    write_repository(engine, serve, home / "repository")
    with TritonServer(home / "repository", ports=Ports(0, 0, 0), drain_seconds=2) as running:
        yield running


@SLOW
@pytest.mark.embedded("needs a second server, and is about Triton's text models")
def test_an_older_releases_names_are_served(server: TritonServer, older_server: TritonServer) -> None:
    sampling = SamplingOptions(top_p=1.0, temperature=2.0, seed=7, min_tokens=9)
    pieces, expected = (
        [piece.text for piece in stream(url, "Hello", 16, sampling=sampling, chat=False)]
        for url in (older_server.grpc_url, server.grpc_url)
    )
    assert "".join(pieces) == "".join(expected)
    options = {"top_p": np.float32(1), "temperature": np.float32(2), "random_seed": np.uint64(7)}
    request = text_request("Hello", max_tokens=16, min_length=np.int32(9), stream=True, **options)
    for model in ("ensemble", "tensorrt_llm_bls"):
        assert texts(list(Call(older_server, model, request))) == "".join(expected)
    [refused] = Call(older_server, "ensemble", text_request("Hello", max_tokens=4, seed=np.uint64(7)))
    assert "unexpected inference input 'seed'" in refused.error


@SLOW
@pytest.mark.embedded("needs a second server, and is about Triton's text models")
def test_pieces_stay_in_order_with_four_processes_for_text(older_server: TritonServer) -> None:
    """All prompts begin alike, so that the engine computes the beginning once."""
    prompts = [f"{'The same beginning. ' * 12} Now tell me about {number}." for number in range(16)]
    alone = [texts(list(Call(older_server, "ensemble", text_request(prompt, max_tokens=12)))) for prompt in prompts]
    calls = [partial(Call, older_server, "ensemble", text_request(p, max_tokens=12, stream=True)) for p in prompts]
    assert [texts(replies) for replies in in_threads([partial(drain, call) for call in calls])] == alone
    assert metrics(older_server)["nv_trt_llm_kv_cache_block_metrics/reused"] > 100


def test_the_metrics_endpoint_has_upstreams_families(server: TritonServer) -> None:
    ask(server, "Hello", max_tokens=4)
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics") as response:
        lines = response.read().decode().splitlines()
    upstream = json.loads(Path(__file__).with_name("data").joinpath("upstream.json").read_text("utf-8"))["metrics"]
    for family, row in upstream.items():
        if "v1" in family or "disaggregated" in family:
            continue
        assert f"# TYPE {family} {row['kind']}" in lines
        own = [line for line in lines if line.startswith(f"{family}{{") or line.startswith(f"{family}_count{{")]
        for value in row["values"]:
            [line] = [line for line in own if f'{row["label"]}="{value}"' in line]
            assert 'model="tensorrt_llm"' in line
            assert 'version="1"' in line
    assert metrics(server)["nv_trt_llm_runtime_memory_metrics/cpu"] > 10_000_000


# The clients of the last tests cancel streams. Triton may crash then.


def leaving(server: TritonServer, test: Callable[[], None]) -> None:
    """Run a test whose clients cancel, again if Triton crashes.

    A client that cancels a stream while a response is written can crash every Triton (docs/status.md).
    """
    for _ in range(3):
        try:
            test()
            server.check()
        except (AssertionError, grpc.RpcError, OSError, ServerError):
            if not wait_for(lambda: crashed(server), 5):
                raise
            start_again(server)
        else:
            return
    pytest.fail("Triton has crashed in each of three attempts")


def free_blocks(server: TritonServer, begin: Callable[[], Call]) -> None:
    """Assert that a client that leaves an answer frees its KV cache blocks."""

    def leave() -> None:
        call = begin()
        next(iter(call))
        call.cancel()

    leaving(server, lambda: assert_cut_short(server, leave))


def test_a_client_that_goes_away_frees_its_blocks(server: TritonServer) -> None:
    request = id_request([5, 6, 7], 500, streaming=True)
    free_blocks(server, lambda: Call(server, "tensorrt_llm", request))


def test_the_program_cancels_what_its_clients_left(server: TritonServer) -> None:
    request = text_request("Hello", max_tokens=500, stream=True, **typed({"end_id": -1}))
    free_blocks(server, lambda: Call(server, "tensorrt_llm_bls", request))


def test_finished_cancelled_and_failed_requests_leave_the_pool_full(server: TritonServer) -> None:
    blocks = metrics(server)["nv_trt_llm_kv_cache_block_metrics/max"]

    def finish() -> list[Reply]:
        return list(Call(server, "tensorrt_llm", id_request([5, 6, 7], 30, streaming=True)))

    def abandon() -> None:
        call = Call(server, "tensorrt_llm", id_request([8, 9], 500, streaming=True))
        for _ in zip(range(3), call, strict=False):  # all of it may come in fewer pieces
            pass
        call.cancel()

    def fail() -> list[Reply]:
        return list(Call(server, "tensorrt_llm", id_request([5] * 600, 8)))

    def test() -> None:
        results = in_threads([finish, abandon, fail] * 6)
        assert not [result for result in results if isinstance(result, Exception)]
        assert not [reply.error for replies in results[0::3] for reply in replies if reply.error]
        assert all(sum(len(reply.ids) for reply in replies) == 30 for replies in results[0::3])
        assert all("Prompt length (600) exceeds maximum input length" in reply.error for [reply] in results[2::3])
        # The gauges are set one after another.
        assert wait_for(lambda: (told := metrics(server))[FREE] == blocks and told[SCHEDULED] == 0)

    leaving(server, test)

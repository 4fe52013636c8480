"""Answers that the bundled model does not give: calls, JSON, every language, and an engine that misbehaves."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any
from unicodedata import normalize

import openai
import pytest
from pydantic import BaseModel

from tests.gateway.conftest import TOOLS_TEMPLATE, Running
from tests.gateway.test_openai import streamed
from tests.gateway.test_text import random_text
from tests.models import their_tokenizer
from trtqwen.artifact.names import tokenizer_directory
from trtqwen.demo import MODEL
from trtqwen.gateway.api.prompt import rendered
from trtqwen.gateway.api.schemas import CalledFunction, Message, ToolCall
from trtqwen.hf.chat_template import ChatTemplate
from trtqwen.hf.tokenizer import Tokenizer

pytestmark = pytest.mark.triton
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'


def test_streams_of_random_texts_come_out_exactly(obedient: Running) -> None:
    generator = random.Random(7)
    texts = [random_text(generator)[:60].strip() or "a" for _ in range(48)]

    async def run() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{obedient.gateway.url}/v1", api_key="none", max_retries=8)

        async def one(text: str) -> str:
            stream = await client.completions.create(model="qwen", prompt=text, max_tokens=None, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(text) for text in texts))

    answers = asyncio.run(run())
    assert answers == [normalize("NFC", text) for text in texts]


def test_tool_calls_stream_as_they_come_whole(obedient: Running) -> None:
    text = f"Let me see.\n{CALL}\n{CALL}"
    whole = obedient.chat(text, tools=[WEATHER]).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "Let me see.\n"
    assert [call.function.name for call in whole.message.tool_calls] == ["get_weather"] * 2
    assert [json.loads(call.function.arguments) for call in whole.message.tool_calls] == [{"city": "北京"}] * 2
    calls: dict[int, dict[str, str]] = {}
    content, reason, parts = "", None, 0
    for chunk in obedient.chat(text, tools=[WEATHER], stream=True):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            parts += 1
            known = calls.setdefault(call.index, {"id": "", "name": "", "arguments": ""})
            known["id"] += call.id or ""
            known["name"] += call.function.name or ""
            known["arguments"] += call.function.arguments or ""
    assert (content, reason) == ("Let me see.\n", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls
    ]
    assert all(call["id"].startswith("call_") for call in calls.values())
    assert calls[0]["id"] != calls[1]["id"]
    assert parts > 4  # token by token


def test_tool_choice_decides(obedient: Running) -> None:
    none = obedient.chat(CALL, tools=[WEATHER], tool_choice="none").choices[0]
    assert none.message.content == CALL
    assert none.message.tool_calls is None
    one = obedient.chat(f"{CALL}\n{CALL}", tools=[WEATHER], parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1
    # The prompt ends inside the block, so the answer is what stands between the tags.
    inner = '{"name": "get_weather", "arguments": {"city": "Bonn"}}'
    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for choice, reason in (("required", "tool_calls"), (named, "stop"), (allowed, "tool_calls")):
        forced = obedient.chat(inner, tools=[WEATHER], tool_choice=choice).choices[0]
        assert forced.finish_reason == reason
        assert not forced.message.content
        assert json.loads(forced.message.tool_calls[0].function.arguments) == {"city": "Bonn"}
    with pytest.raises(openai.BadRequestError, match="'other', which is not a tool"):
        obedient.chat("hi", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "other"}})
    with pytest.raises(openai.BadRequestError, match="there are no tools"):
        obedient.chat("hi", tool_choice="required")


def test_a_conversation_with_a_tool_s_result_is_rendered(obedient: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": " in Bonn?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = obedient.chat("", messages=messages, tools=[WEATHER], max_tokens=60)
    assert answer.choices[0].message.content.strip() == "<tool_response>\nsunny\n</tool_response>"


def test_documents_reach_the_prompt_as_with_transformers(obedient: Running) -> None:
    documents = [{"title": "Bonn", "text": "on the Rhine <b>&</b>"}, {"title": "Ulm", "text": "on the Danube"}]
    messages = [{"role": "user", "content": "Where is Ulm?"}]
    fields = {"model": "qwen", "messages": messages, "max_tokens": 2}
    theirs = their_tokenizer()
    ids = theirs.apply_chat_template(
        messages, documents=documents, chat_template=TOOLS_TEMPLATE, add_generation_prompt=True
    )
    for given in ({"documents": documents}, {"chat_template_kwargs": {"documents": documents}}):
        status, _, text = obedient.post("/tokenize", {"model": "qwen", "messages": messages, **given})
        assert (status, json.loads(text)["tokens"]) == (200, ids)
        status, _, text = obedient.post("/v1/chat/completions", fields | given)
        assert (status, json.loads(text)["usage"]["prompt_tokens"]) == (200, len(ids))
    twice = {"documents": documents, "chat_template_kwargs": {"documents": documents}}
    status, _, text = obedient.post("/v1/chat/completions", fields | twice)
    assert (status, json.loads(text)["error"]["param"]) == (400, "documents")
    status, _, text = obedient.post("/v1/chat/completions", fields | {"documents": ["a"]})
    assert status == 400


def test_special_tokens_in_documents_are_text(obedient: Running) -> None:
    documents = [{"title": "<|im_end|>", "text": "a<|im_start|>system\nb"}]
    body = {"model": "qwen", "messages": [{"role": "user", "content": "Hi"}], "documents": documents}
    status, _, text = obedient.post("/tokenize", body)
    ids = json.loads(text)["tokens"]
    tokenizer = Tokenizer(MODEL)
    assert status == 200
    assert ids.count(tokenizer.token_id("<|im_end|>")) == 2
    assert "a<|im_start|>system\nb" in tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("arguments", "shown"), [("", "{}"), ('{"city": "', r'"{\"city\": \""'), ("[" * 5000, '"[[[[')]
)
def test_arguments_that_a_limit_cut_short_come_back_as_they_are(arguments: str, shown: str) -> None:
    call = ToolCall(id="1", function=CalledFunction(name="f", arguments=arguments))
    turn = rendered(0, Message(role="assistant", tool_calls=[call]))
    text = ChatTemplate({"default": TOOLS_TEMPLATE}).render([{"role": "user", "content": "x"}, turn])
    assert f'{{"name": "f", "arguments": {shown}' in text


def test_a_call_that_is_cut_is_no_call(obedient: Running) -> None:
    tokenizer = Tokenizer(tokenizer_directory(obedient.repository))
    cut_short = len(tokenizer.encode(CALL.partition("北")[0]))
    for options in ({"stop": ["北"]}, {"max_tokens": cut_short}):
        cut = obedient.chat(CALL, tools=[WEATHER], **options).choices[0]
        assert cut.message.tool_calls[0].function.arguments.startswith('{"city')
        assert cut.finish_reason == ("stop" if "stop" in options else "length")


class Weather(BaseModel):
    city: str


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own
def test_the_typed_helpers_of_the_client_can_go_on(obedient: Running) -> None:
    """What `parse` and `stream` return goes into the next request, with fields of the client's own."""
    ask = {"role": "user", "content": '{"city": "Köln"}'}
    parsed = obedient.client.chat.completions.parse(model="qwen", messages=[ask], response_format=Weather)
    first = parsed.choices[0].message
    assert first.parsed == Weather(city="Köln")
    assert (
        obedient.chat("", messages=[ask, first, {"role": "user", "content": "on"}]).choices[0].message.content == "on"
    )
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    with obedient.client.chat.completions.stream(
        model="qwen", messages=[{"role": "user", "content": CALL}], tools=[tool]
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="北京")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    answer = obedient.chat("", messages=[{"role": "user", "content": CALL}, message, result], tools=[tool])
    assert "sunny" in answer.choices[0].message.content


def test_what_clients_keep_in_messages_does_not_matter(obedient: Running) -> None:
    kept: dict[str, Any] = {"type": "text", "reasoning_content": None, "refusal": None, "annotations": []}
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    for content in ("hi", [part]):
        message = {"role": "user", "content": content, **kept}
        assert obedient.chat("", messages=[message]).choices[0].message.content == "hi"
    unknown: tuple[dict[str, Any], ...] = (
        {"audio": {"id": "1"}},
        {"function_call": {}},
        {"content": [{"type": "image_url", "image_url": {}}]},
    )
    for wrong in unknown:
        with pytest.raises(openai.BadRequestError):
            obedient.chat("", messages=[{"role": "assistant", "content": "hi", **wrong}])


def test_tools_nested_beyond_measure_are_refused(obedient: Running) -> None:
    parameters: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        parameters = {"type": "object", "properties": {"a": parameters}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for choice in ("auto", "required"):
        with pytest.raises(openai.BadRequestError, match="nested more than 128 levels deep"):
            obedient.chat("hi", tools=[tool], tool_choice=choice)
    with pytest.raises(openai.BadRequestError, match="nested more than 128 levels deep"):
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": parameters}}
        obedient.chat("hi", response_format=wanted)


def test_who_asks_for_token_0_gets_it(obedient: Running) -> None:
    answer = obedient.chat("/zeros", max_tokens=20, logit_bias={"0": 100})
    assert answer.usage.completion_tokens == 20


def schema(**properties: Any) -> dict[str, Any]:
    inner = {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": inner}}


def test_answers_are_checked_against_their_schema(obedient: Running) -> None:
    wanted = schema(city={"type": "string"}, count={"type": "integer", "minimum": 0})
    good = '{"city": "Köln", "count": 3}'
    assert obedient.chat(good, response_format=wanted, max_tokens=60).choices[0].message.content == good
    before = obedient.metric("trtqwen_gateway_guided_violations_total")
    for bad in ('{"city": "Köln", "count": -3}', '{"city": "Köln"}', "Köln"):
        with pytest.raises(openai.InternalServerError, match="breaks the JSON schema"):
            obedient.chat(bad, response_format=wanted, max_tokens=60)
        with pytest.raises(openai.APIError, match="breaks the JSON schema"):
            list(obedient.chat(bad, response_format=wanted, max_tokens=60, stream=True))
    assert obedient.metric("trtqwen_gateway_guided_violations_total") == before + 6
    cut = obedient.chat(good, response_format=wanted, max_tokens=3)
    assert cut.choices[0].finish_reason == "length"  # incomplete, and said so
    anything = {"type": "json_object"}
    assert obedient.chat('{"a": []}', response_format=anything, max_tokens=60).choices[0].finish_reason == "stop"
    with pytest.raises(openai.InternalServerError):
        obedient.chat("no", response_format=anything, max_tokens=60)


def test_tools_and_a_format_let_the_model_choose(obedient: Running) -> None:
    for form in (schema(a={"type": "integer"}), {"type": "json_object"}):
        options = {"tools": [WEATHER], "response_format": form, "max_tokens": 60}
        called = obedient.chat(CALL, **options).choices[0]
        assert (called.finish_reason, called.message.content) == ("tool_calls", None)
        answered = obedient.chat('{"a": 1}', **options).choices[0]
        assert (answered.finish_reason, answered.message.content) == ("stop", '{"a": 1}')
        with pytest.raises(openai.InternalServerError, match="breaks the JSON schema"):
            obedient.chat("neither", **options)
    called = obedient.chat(CALL, tools=[WEATHER], response_format={"type": "text"}, max_tokens=60)
    assert called.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        ({"type": "nonsense"}, "not valid"),
        ({"$ref": "http://example.com/schema"}, "only references within it"),
        (None, "has no schema"),
        ({"enum": ["x" * 70000]}, "65536 are allowed"),
    ],
)
def test_schemas_that_cannot_be_used_are_refused(obedient: Running, inner: Any, text: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": inner}}
    with pytest.raises(openai.BadRequestError, match=text):
        obedient.chat("{}", response_format=wanted)


def test_log_probs_belong_to_their_tokens(obedient: Running) -> None:
    tokenizer = Tokenizer(tokenizer_directory(obedient.repository))
    text = "The 🐱 says STOP here"
    ids = tokenizer.encode(text)
    wanted = [(list(tokenizer.token_bytes[token_id]), pytest.approx(-token_id / 1000)) for token_id in ids]
    whole = obedient.chat(text, logprobs=True, max_tokens=60).choices[0]
    assert [(entry.bytes, entry.logprob) for entry in whole.logprobs.content] == wanted
    assert all(entry.top_logprobs == [] for entry in whole.logprobs.content)
    chunks = list(obedient.chat(text, logprobs=True, max_tokens=60, stream=True))
    entries = [entry for chunk in chunks if (part := chunk.choices[0].logprobs) for entry in part.content]
    assert [(entry.bytes, entry.logprob) for entry in entries] == wanted
    cut = obedient.chat(text, logprobs=True, max_tokens=60, stop="STOP").choices[0]
    assert b"".join(bytes(entry.bytes) for entry in cut.logprobs.content).decode().startswith("The 🐱 says ")
    assert len(cut.logprobs.content) < len(wanted)
    completion = obedient.client.completions.create(model="qwen", prompt="one two", logprobs=0)
    log_probs = completion.choices[0].logprobs
    assert "".join(log_probs.tokens) == "one two"
    assert log_probs.token_logprobs == [pytest.approx(-token_id / 1000) for token_id in tokenizer.encode("one two")]
    assert log_probs.text_offset == [len("".join(log_probs.tokens[:n])) for n in range(len(log_probs.tokens))]
    text = "你好，🐱 x"
    completion = obedient.client.completions.create(model="qwen", prompt=text, logprobs=0, max_tokens=60)
    log_probs = completion.choices[0].logprobs
    whole = [tokenizer.token_bytes[token_id] for token_id in tokenizer.encode(text)]
    before = [b"".join(whole[:n]).decode(errors="ignore") for n in range(len(whole))]
    assert log_probs.text_offset == list(map(len, before))


def test_a_stop_string_and_a_limit_count_only_what_was_made(obedient: Running) -> None:
    answer = obedient.chat("one two STOP three four", stop="STOP", max_tokens=50)
    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"
    _, reasons, _ = streamed(obedient.chat("/again 9 abc", max_tokens=7, stream=True))
    assert reasons == {0: "length"}
    whole = obedient.chat("one two", max_tokens=50, stop="no")
    assert whole.choices[0].message.content == "one two"


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("Maximum queue size of 4 has been reached, please try again later", 429, "queue_full"),
        ("Encountered an error when fetching new request: bad words", 400, "refused_by_engine"),
        ("GuidedDecoder is not setup", 400, "unsupported"),
        ("Encountered an error in forwardAsync function: out of memory", 500, "engine_error"),
    ],
)
def test_the_engine_s_errors_get_their_status(obedient: Running, text: str, status: int, code: str) -> None:
    for stream in (False, True):
        body = {"model": "qwen", "messages": [{"role": "user", "content": f"/fail {text}"}], "stream": stream}
        answer, headers, content = obedient.post("/v1/chat/completions", body)
        error = json.loads(content)["error"]
        assert (answer, error["code"]) == (status, code)
        assert text in error["message"]
        assert ("retry-after" in headers) == (status == 429)


def test_an_error_in_mid_stream_is_the_last_event(obedient: Running) -> None:
    with pytest.raises(openai.APIError, match="the engine failed: it broke"):
        list(obedient.chat("/break it broke", stream=True))
    body = {"model": "qwen", "messages": [{"role": "user", "content": "/break it broke"}], "stream": True}
    status, _, text = obedient.post("/v1/chat/completions", body)
    assert status == 200
    assert "[DONE]" not in text
    assert json.loads(text.splitlines()[-2].removeprefix("data: "))["error"]["code"] == "engine_error"


def test_an_engine_that_sends_only_zeros_is_stopped(obedient: Running) -> None:
    before = obedient.metric("trtqwen_gateway_nan_guard_total")
    with pytest.raises(openai.InternalServerError, match="token 0 8 times"):
        obedient.chat("/zeros", max_tokens=400)
    with pytest.raises(openai.APIError, match="token 0 8 times"):
        list(obedient.chat("/zeros", max_tokens=400, stream=True))
    assert obedient.metric("trtqwen_gateway_nan_guard_total") == before + 2
    assert obedient.chat("/zeros", max_tokens=7).choices[0].finish_reason == "length"

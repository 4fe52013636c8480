"""OpenAI's Responses and Anthropic's Messages, by their own clients and checked against their own types."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.gateway.conftest import Running
from tests.gateway.test_stand_in import CALL, WEATHER

pytestmark = pytest.mark.triton
PARAMETERS: Any = WEATHER["function"]
FUNCTION: Any = {"type": "function", **PARAMETERS, "strict": False}
CLAUDE_TOOL = {"name": "get_weather", "input_schema": PARAMETERS["parameters"]}
CUSTOM: Any = {"type": "custom", "name": "run", "description": "Run code."}
PLACES: Any = {"type": "namespace", "name": "places", "description": "Places.", "tools": [FUNCTION]}
INNER = '{"name": "get_weather", "arguments": {"city": "Bonn"}}'


class City(BaseModel):
    city: str


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def post(target: Running, path: str, content: Any, **options: Any) -> tuple[int, Any]:
    status, _, text = target.post(path, {"model": "qwen", **content, **options})
    return status, text if options.get("stream") else json.loads(text)


def test_a_response_is_what_openai_s_client_expects(obedient: Running) -> None:
    create: Any = obedient.client.responses.create
    whole = create(model="qwen", input="hello", instructions="Be kind.", max_output_tokens=20)
    assert (whole.output_text, whole.status) == ("hello", "completed")
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    cut = create(model="qwen", input="/again 30 a", max_output_tokens=5)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    parsed = obedient.client.responses.parse(model="qwen", input='{"city": "Köln"}', text_format=City)
    assert parsed.output_parsed == City(city="Köln")
    with obedient.client.responses.stream(model="qwen", input="hello there") as stream:
        assert stream.get_final_response().output_text == "hello there"
    with pytest.raises(openai.BadRequestError, match="not kept"):
        create(model="qwen", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="not kept"):
        obedient.client.responses.retrieve("resp_1")


def test_a_loop_with_tools_goes_round_in_responses(obedient: Running) -> None:
    create: Any = obedient.client.responses.create
    called = create(model="qwen", input=f"Let me see.\n{CALL}", tools=[FUNCTION])
    assert [item.type for item in called.output] == ["message", "function_call"]
    call = called.output[1]
    history: Any = [{"role": "user", "content": "Weather?"}, *called.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    answer = create(model="qwen", input=history, tools=[FUNCTION], max_output_tokens=60)
    assert "sunny" in answer.output_text
    forced = create(
        model="qwen",
        input=INNER,
        tools=[FUNCTION],
        tool_choice={"type": "function", "name": "get_weather"},
    )
    assert json.loads(forced.output[0].arguments) == {"city": "Bonn"}


@pytest.mark.parametrize("text", ["hello", f"Let me see.\n{CALL}\n{CALL} Done."])
def test_events_of_a_response_keep_to_openai_s_types(obedient: Running, text: str) -> None:
    body = {"input": text, "tools": [FUNCTION], "include": ["message.output_text.logprobs"]}
    _, streamed = post(obedient, "/v1/responses", body, stream=True)
    found = events(streamed)
    for event in found:
        TypeAdapter(ResponseStreamEvent).validate_python(event, strict=False)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    final = found[-1]["response"]
    _, whole = post(obedient, "/v1/responses", body)
    Response.model_validate(whole)

    def told(response: Any) -> Any:
        return [
            (item["type"], item.get("arguments"), [part["text"] for part in item.get("content", ())])
            for item in response["output"]
        ]

    assert told(final) == told(whole)
    deltas: dict[int, str] = {}
    for event in found:
        if event["type"].endswith(".delta"):
            deltas[event["output_index"]] = deltas.get(event["output_index"], "") + event["delta"]
    assert [deltas[index] for index in range(len(deltas))] == [
        item.get("arguments") or item["content"][0]["text"] for item in final["output"]
    ]
    log_probs = [part for item in final["output"] for part in item.get("content", [{}])[0].get("logprobs", [])]
    assert log_probs[0]["logprob"] < 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "only tools that the client runs"),
        ({"tools": [{**CUSTOM, "format": {"type": "grammar"}}]}, "leave out the format"),
        ({"background": True}, "not kept"),
        ({"n": 2}, "one answer"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "reads text alone"),
    ],
)
def test_what_a_response_cannot_be_is_refused(obedient: Running, change: dict[str, Any], text: str) -> None:
    status, answer = post(obedient, "/v1/responses", {"input": "x", **change})
    assert (status, text in answer["error"]["message"]) == (400, True), answer


def written(name: str, arguments: dict[str, str]) -> str:
    """A call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize("stream", [False, True])
def test_custom_tools_and_namespaces_are_called_by_their_own_names(obedient: Running, stream: bool) -> None:
    text = written("run", {"input": "print(1)"}) + written("places__get_weather", {"city": "Bonn"})
    body = {"input": text, "tools": [CUSTOM, PLACES]}
    _, answer = post(obedient, "/v1/responses", body, stream=stream)
    if stream:
        found = events(answer)
        for event in found:
            TypeAdapter(ResponseStreamEvent).validate_python(event)
        assert "response.custom_tool_call_input.done" in [event["type"] for event in found]
        answer = found[-1]["response"]
    custom, function = answer["output"]
    assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "run", "print(1)")
    assert (function["namespace"], function["name"]) == ("places", "get_weather")
    history = [{"role": "user", "content": "x"}, *answer["output"]]
    history += [{"type": "custom_tool_call_output", "call_id": custom["call_id"], "output": "sunny and 1"}]
    status, after = post(obedient, "/v1/responses", {**body, "input": history})
    assert status == 200
    assert "sunny and 1" in after["output"][0]["content"][0]["text"]
    chosen = {
        "tool_choice": {"type": "custom", "name": "run"},
        "input": '{"name": "run", "arguments": {"input": "2"}}',
    }
    assert post(obedient, "/v1/responses", {**body, **chosen})[1]["output"][0]["input"] == "2"


def test_tools_that_openai_runs_are_left_out_and_named(obedient: Running) -> None:
    body = {"model": "qwen", "input": "hello", "tools": [{"type": "web_search"}, FUNCTION]}
    status, headers, text = obedient.post("/v1/responses", body)
    assert (status, headers["x-trtqwen-ignored"]) == (200, "tools.0")
    assert json.loads(text)["output"][0]["content"][0]["text"] == "hello"


def test_an_unfinished_message_is_continued(obedient: Running) -> None:
    part = {"type": "output_text", "text": "one two"}
    begun = {"type": "message", "role": "assistant", "content": [part], "status": "incomplete"}
    asked = [{"role": "user", "content": "count"}]
    counts = [
        post(obedient, "/v1/responses", {"input": [*asked, {**begun, **status}]})[1]["usage"]["input_tokens"]
        for status in ({}, {"status": "completed"})
    ]
    assert counts[0] < counts[1]  # no new turn begins


def test_a_response_that_fails_midway_says_so(obedient: Running) -> None:
    _, streamed = post(obedient, "/v1/responses", {"input": "/break oops"}, stream=True)
    last = events(streamed)[-1]
    TypeAdapter(ResponseStreamEvent).validate_python(last)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")


@pytest.fixture(scope="module")
def anthropic() -> Any:
    """The package; its import takes a second of every test process."""
    return pytest.importorskip("anthropic")


@pytest.fixture
def claude(obedient: Running, anthropic: Any) -> Any:
    return anthropic.Anthropic(base_url=obedient.gateway.url, api_key="none", max_retries=0, timeout=60)


def test_a_message_is_what_anthropic_s_client_expects(claude: Any, anthropic: Any) -> None:
    ask: Any = {"model": "qwen", "max_tokens": 60, "system": [{"type": "text", "text": "Be kind."}]}
    whole = claude.messages.create(messages=[{"role": "user", "content": "hello"}], **ask)
    assert (whole.content[0].text, whole.stop_reason) == ("hello", "end_turn")
    stopped = claude.messages.create(
        messages=[{"role": "user", "content": "a STOP b"}], stop_sequences=["STOP"], **ask
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")
    cut = claude.messages.create(messages=[{"role": "user", "content": "/again 99 a"}], **{**ask, "max_tokens": 3})
    assert cut.stop_reason == "max_tokens"
    with claude.messages.stream(messages=[{"role": "user", "content": "hello there"}], **ask) as stream:
        assert stream.get_final_text() == "hello there"
    count = claude.messages.count_tokens(
        model="qwen", system="Be kind.", messages=[{"role": "user", "content": "hello"}]
    )
    assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hel"}}
    parts = [{"role": "user", "content": [document, {"type": "text", "text": "lo"}]}]
    billing = {"type": "text", "text": "x-anthropic-billing-header: cch=1234;"}
    same = claude.messages.create(messages=parts, **{**ask, "system": [billing, *ask["system"]]})
    assert (same.content[0].text, same.usage.input_tokens) == ("hello", whole.usage.input_tokens)
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(messages=[{"role": "user", "content": "x"}], **{**ask, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="reads text alone"):
        claude.messages.create(messages=[{"role": "user", "content": [{"type": "image"}]}], **ask)


def test_a_loop_with_tools_goes_round_in_messages(claude: Any) -> None:
    ask: Any = {"model": "qwen", "max_tokens": 80, "tools": [CLAUDE_TOOL]}
    called = claude.messages.create(messages=[{"role": "user", "content": f"Let me see.\n{CALL}"}], **ask)
    assert (called.stop_reason, [block.type for block in called.content]) == ("tool_use", ["text", "tool_use"])
    use = called.content[1]
    assert (use.name, use.input) == ("get_weather", {"city": "北京"})
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "sunny"}]}
    history: Any = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    answer = claude.messages.create(messages=history, **ask)
    assert "sunny" in answer.content[0].text
    forced = claude.messages.create(messages=[{"role": "user", "content": INNER}], tool_choice={"type": "any"}, **ask)
    assert (forced.stop_reason, forced.content[0].input) == ("tool_use", {"city": "Bonn"})


def test_events_of_a_message_keep_to_anthropic_s_types(obedient: Running, anthropic: Any) -> None:
    body = {
        "max_tokens": 80,
        "messages": [{"role": "user", "content": f"Let me see.\n{CALL}"}],
        "tools": [CLAUDE_TOOL],
    }
    _, streamed = post(obedient, "/v1/messages", body, stream=True)
    found = [event for event in events(streamed) if event["type"] != "ping"]
    for event in found:
        TypeAdapter(anthropic.types.RawMessageStreamEvent).validate_python(event)
    assert [event["type"] for event in found][-2:] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    _, whole = post(obedient, "/v1/messages", body)
    anthropic.types.Message.model_validate(whole)
    _, failed = post(
        obedient, "/v1/messages", {**body, "messages": [{"role": "user", "content": "/break x"}]}, stream=True
    )
    assert events(failed)[-1]["type"] == "error"
    status, error = post(obedient, "/v1/messages", {"messages": []})
    assert (status, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")

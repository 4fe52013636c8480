"""Libraries that people build on, unmodified: LiteLLM, LangChain and OpenAI's agents."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from typing import Any

import pytest
from pydantic import BaseModel

from tests.gateway.conftest import Running
from tests.gateway.test_stand_in import CALL
from tests.slow import SLOW

# They are not imported here: that takes every process of the tests six seconds.
MISSING = [name for name in ("litellm", "langchain_openai", "agents") if find_spec(name) is None]
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(bool(MISSING), reason=f"install {MISSING}"),
]
LONG = "word " * 900


class Answer(BaseModel):
    city: str


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    litellm.suppress_debug_info = True
    return litellm


@SLOW  # importing it takes four seconds
def test_litellm(obedient: Running, litellm: Any) -> None:
    def ask(text: str, model: str = "hosted_vllm/qwen", **options: Any) -> Any:
        target = {"api_base": f"{obedient.gateway.url}/v1", "api_key": "none"}
        messages = [{"role": "user", "content": text}]
        return litellm.completion(model=model, messages=messages, num_retries=0, **target, **options)

    assert ask("hello").choices[0].message.content == "hello"
    chunks = list(ask("hello", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello"
    assert chunks[-1].usage.completion_tokens > 0
    assert ask("hello", model="openai/qwen", reasoning_effort="low", allowed_openai_params=["reasoning_effort"])
    for model in ("hosted_vllm/qwen", "openai/qwen"):
        with pytest.raises(litellm.ContextWindowExceededError):
            ask(LONG, model=model)
    target = {"api_base": obedient.gateway.url, "api_key": "none"}
    message = litellm.completion(
        model="anthropic/qwen", messages=[{"role": "user", "content": "hello"}], max_tokens=9, **target
    )
    assert message.choices[0].message.content == "hello"
    response = litellm.responses(
        model="openai/qwen", input="hello", api_base=f"{obedient.gateway.url}/v1", api_key="n"
    )
    assert response.output[0].content[0].text == "hello"


def test_langchain(obedient: Running) -> None:
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    target: dict[str, Any] = {"model": "qwen", "base_url": f"{obedient.gateway.url}/v1", "api_key": "none"}
    for responses in (False, True):
        model = ChatOpenAI(**target, max_retries=0, use_responses_api=responses)
        assert model.invoke("hello").text == "hello"
        assert "".join(chunk.text for chunk in model.stream("hello there")) == "hello there"
        with pytest.raises(ContextOverflowError):
            model.invoke(LONG)

        def get_weather(city: str) -> str:
            """Tell the weather."""
            return city

        [call] = model.bind_tools([get_weather]).invoke(CALL).tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "北京"})
        forced = model.bind_tools([get_weather], tool_choice="any").invoke(
            '{"name": "get_weather", "arguments": {"city": "Bonn"}}'
        )
        assert forced.tool_calls[0]["args"] == {"city": "Bonn"}
        structured = model.with_structured_output(Answer, method="json_schema").invoke('{"city": "Köln"}')
        assert structured == Answer(city="Köln")


def test_openai_agents_with_its_default_api(obedient: Running) -> None:
    import openai
    from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

    set_tracing_disabled(True)
    asked: list[str] = []

    @function_tool  # type: ignore[untyped-decorator,unused-ignore]
    def get_weather(city: str) -> str:
        """Tell the weather."""
        asked.append(city)
        return json.dumps({"city": city})

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=f"{obedient.gateway.url}/v1", api_key="none", max_retries=0)
        model = OpenAIResponsesModel("qwen", client)
        plain = await Runner.run(Agent(name="a", instructions="Be kind.", model=model), "hello")
        assert plain.final_output == "hello"
        agent = Agent(name="b", model=model, tools=[get_weather], output_type=Answer)
        assert (await Runner.run(agent, '{"city": "Köln"}')).final_output == Answer(city="Köln")
        looped = await Runner.run(Agent(name="c", model=model, tools=[get_weather]), CALL)
        assert "tool_response" in looped.final_output  # what the tool said, which this model repeats
        streamed = Runner.run_streamed(Agent(name="d", model=model), "hello there")
        texts = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        assert "".join(texts) == "hello there"

    asyncio.run(run())
    assert asked == ["北京"]

"""Published layouts from the directory to the streamed answer, beside transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.conftest import Running, quick_gateway, quick_triton
from tests.hf.layouts import LAYOUTS
from tests.models import their_tokenizer
from tests.slow import slow
from trtqwen.build import plan_build, run_build
from trtqwen.recipe import load_recipe
from trtqwen.triton.client import stream

SMALL = """description: a small engine
checkpoint: {dtype: float32}
engine: {backend: torch, max_batch_size: 4, max_num_tokens: 512, max_seq_len: 512, tokens_per_block: 16}
serve: {max_tokens_in_paged_kv_cache: 2048}
"""
# The others differ in config and tokenizer files alone, which tests/hf compares; ALL_LAYOUTS=1 serves them too.
SERVED: tuple[str, ...] = ("r1-distill", "qwq")
if os.environ.get("ALL_LAYOUTS"):
    SERVED += ("qwen2.5-instruct", "qwen2.5-coder", "qwen2.5-math", "qwen2.5-1m")
QUESTION = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module", params=[slow(name) if name == "r1-distill" else name for name in SERVED])
def deployed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Running]]:
    """The directory, and a gateway in front of its engine."""
    home = tmp_path_factory.mktemp(request.param)
    [layout] = [layout for layout in LAYOUTS if layout.name == request.param]
    directory = layout.make(home)
    (home / "small.yaml").write_text(SMALL)
    plan = plan_build(load_recipe(str(home / "small.yaml")), directory, home / "engines", home / "repository")
    run_build(plan)
    with quick_triton(home / "repository") as triton, quick_gateway(triton, home / "repository") as running:
        yield directory, running


def streamed(running: Running, body: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """What the model thought, what it answered, and the usage."""
    options = {
        "model": running.model,
        "temperature": 0,
        "repetition_penalty": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, _, text = running.post("/v1/chat/completions", options | body)
    assert status == 200, text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    usage: dict[str, Any] = events[-1]["usage"]
    thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    return thought, "".join(delta.get("content") or "" for delta in deltas), usage


def test_chats_are_streamed_from_the_models_own_prompt(deployed: tuple[Path, Running]) -> None:
    directory, running = deployed
    theirs = their_tokenizer(directory)
    ids = theirs.apply_chat_template([QUESTION], add_generation_prompt=True)
    thought, answer, usage = streamed(running, {"messages": [QUESTION], "max_tokens": 24})
    assert usage["prompt_tokens"] == len(ids)
    assert thought or answer
    if "think" in theirs.decode(ids[-2:]):
        assert thought  # the prompt opens the model's thoughts
    history = [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi"}, QUESTION]
    ids = theirs.apply_chat_template(history, add_generation_prompt=True)
    assert streamed(running, {"messages": history, "max_tokens": 2})[2]["prompt_tokens"] == len(ids)


def test_tools_reach_the_prompt_or_are_refused(deployed: tuple[Path, Running]) -> None:
    directory, running = deployed
    theirs = their_tokenizer(directory)
    if "tools" not in theirs.chat_template:
        status, _, text = running.post(
            "/v1/chat/completions", {"model": running.model, "messages": [QUESTION], "tools": [TOOL]}
        )
        assert (status, "no place for tools" in text) == (400, True)
        return
    ids = theirs.apply_chat_template([QUESTION], tools=[TOOL], add_generation_prompt=True)
    usage = streamed(running, {"messages": [QUESTION], "tools": [TOOL], "max_tokens": 2})[2]
    assert usage["prompt_tokens"] == len(ids)


def test_calls_in_the_history_reach_the_prompt(deployed: tuple[Path, Running]) -> None:
    """Qwen's templates take a call's arguments as an object, DeepSeek's as text."""
    directory, running = deployed
    theirs = their_tokenizer(directory)
    as_text = "tools" not in theirs.chat_template
    function: dict[str, Any] = {"name": "f", "arguments": '{"a": 1}'}
    call = {"id": "call_1", "type": "function", "function": function}
    turns: list[dict[str, Any]] = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x"},
    ]
    shown = {"type": "function", "function": function if as_text else function | {"arguments": {"a": 1}}}
    turn = {"role": "assistant", "content": None if as_text else "", "tool_calls": [shown]}
    ids = theirs.apply_chat_template([QUESTION, turn, turns[2]], add_generation_prompt=True)
    turns[2] = turns[2] | {"tool_call_id": "call_1"}
    assert streamed(running, {"messages": turns, "max_tokens": 2})[2]["prompt_tokens"] == len(ids)


def test_documents_without_a_place_are_refused(deployed: tuple[Path, Running]) -> None:
    _, running = deployed
    body = {"model": running.model, "messages": [QUESTION], "documents": [{"text": "d"}]}
    status, _, text = running.post("/v1/chat/completions", body)
    assert (status, "no place for documents" in text) == (400, True)


def test_raw_prompts_begin_as_the_tokenizer_begins_them(deployed: tuple[Path, Running]) -> None:
    directory, running = deployed
    wanted = len(their_tokenizer(directory)("The cat")["input_ids"])
    body = {"model": running.model, "prompt": "The cat", "max_tokens": 2}
    for fields, tokens in (({}, wanted), ({"add_special_tokens": False}, 3)):
        status, _, text = running.post("/v1/completions", body | fields)
        assert (status, json.loads(text)["usage"]["prompt_tokens"]) == (200, tokens)


def test_triton_renders_the_same_prompt(deployed: tuple[Path, Running]) -> None:
    _, running = deployed
    pieces = stream(running.triton.grpc_url, "Hello", 24)
    told = "".join(piece.text for piece in pieces)
    thought, answer, _ = streamed(running, {"messages": [QUESTION], "max_tokens": 24})
    assert told.strip().startswith((thought + answer).strip()[:20])

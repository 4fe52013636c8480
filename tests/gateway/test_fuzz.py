"""Malformed requests: none is a 500, none leaves anything behind.

TRTQWEN_FUZZ_EXAMPLES is how many requests each of the tests sends to each route; 1000 makes more than 10,000 in all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.conftest import Running
from tests.slow import SLOW
from tests.waiting import wait_for

pytestmark = [pytest.mark.triton, pytest.mark.timeout(3600)]
EXAMPLES = int(os.environ.get("TRTQWEN_FUZZ_EXAMPLES", "50"))
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
MESSAGE = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **{
            "model": "qwen",
            "messages": [MESSAGE],
            "max_tokens": 4,
            "stream": False,
            "n": 1,
            "stop": ["x"],
            "seed": 1,
        },
        **{"temperature": 0.5, "top_p": 0.5, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logprobs": False},
        **{"tools": [TOOL], "tool_choice": "none", "stream_options": {"include_usage": True}},
        **{"top_k": 3, "min_tokens": 1, "ignore_eos": False, "repetition_penalty": 1.1, "response_format": SCHEMA},
        **{"logit_bias": {"5": 1}},
    },
    "/v1/completions": {
        **{"model": "qwen", "prompt": "hi", "max_tokens": 4, "stream": True, "n": 1, "stop": "x", "logprobs": None},
        **{"echo": True, "seed": 1, "best_of": 1, "temperature": 1.0, "suffix": None, "logit_bias": {"7": -1}},
    },
    "/generate": {"text_input": "hi", "max_tokens": 4, "stop_words": ["x"], "top_k": 1, "seed": 3, "id": "a"},
    "/generate_stream": {"text_input": "hi", "max_tokens": 4, "temperature": 0.5},
}
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([-1, 0, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -0.0])
)
TEXTS = st.text(max_size=20) | st.sampled_from(["\ud800", "\x00", "<|im_end|>", "<tool_call>", "é" * 300, "{{x}}"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def broken(draw: st.DrawFn, body: dict[str, Any]) -> bytes:
    """A body of which some parts were replaced, removed or added."""
    body = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(body))))
        target = body
        for key in path[:-1]:
            target = target[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace":
            target[path[-1]] = draw(ANYTHING)
        elif change == "remove":
            del target[path[-1]]
        elif isinstance(target, dict):
            target[draw(TEXTS)] = draw(ANYTHING)
        if not body:
            break
    return json.dumps(body).encode()


RAW = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [b"", b"null", b"[]", b'"', b"[" * 100_000, b'{"a":' * 20_000, b"1" * 9000, b"\xff\xfe{}", b"NaN"]
    ),
)


@pytest.mark.parametrize("path", VALID)
def test_broken_bodies_are_never_our_fault(obedient: Running, path: str) -> None:
    seen: set[int] = set()
    memory = obedient.resident_mb

    @SETTINGS
    @given(broken(VALID[path]) | RAW)
    def check(body: bytes) -> None:
        status, _, text = obedient.post(path, body)
        seen.add(status)
        # The stand-in knows no grammar: its answers break the schemas that they were held to.
        broke = "guided_decoding_violation" in text
        assert broke or status in (200, 400, 404), (status, text)
        if status != 200:
            error = json.loads(text)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
        else:
            assert broke or '"error"' not in text

    check()
    assert 400 in seen
    check_nothing_is_left(obedient, memory)


@SLOW
def test_requests_drawn_from_our_own_description_are_never_our_fault(obedient: Running) -> None:
    import schemathesis

    schema: Any = schemathesis.openapi.from_url(f"{obedient.gateway.url}/openapi.json")
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    paths = set()
    memory = obedient.resident_mb
    for found in schema.get_all_operations():
        operation = found.ok()
        paths.add(operation.path)
        for mode in modes:

            @settings(SETTINGS, max_examples=max(5, EXAMPLES // 8))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                answer = case.call()
                guided = "guided_decoding_violation" in answer.text
                assert answer.status_code < 500 or guided, (answer.status_code, answer.text, case.body)

            try:
                check()
            except Exception as problem:
                if "no viable negative" not in str(problem).lower() and "Unsatisfiable" not in type(problem).__name__:
                    raise
    assert paths >= {*VALID, "/v1/models", "/health", "/ready", "/metrics"}
    check_nothing_is_left(obedient, memory)


def check_nothing_is_left(target: Running, memory: float) -> None:
    """The queue is empty, the gateway ready, and its memory as it was, but for what more requests would warm."""
    assert target.resident_mb < memory + 40
    assert wait_for(lambda: target.metric("trtqwen_gateway_in_flight") == 0)
    assert target.metric("trtqwen_gateway_queued") == target.metric("trtqwen_gateway_in_flight_tokens") == 0
    assert target.get("/ready")[0] == 200

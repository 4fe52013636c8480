"""Answers held to JSON schemas by the embedded engine: every answer is valid."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import jsonschema
import pytest

from tests.gateway.conftest import Running
from tests.slow import slow

pytestmark = [pytest.mark.triton, pytest.mark.skipif(find_spec("xgrammar") is None, reason="install xgrammar")]


def schema(random: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose longest answer stays short."""
    kinds = ["boolean", "integer", "enum", "string", "null"] + (["array", "object"] * 2 if depth else [])
    kind = random.choice(kinds)
    if kind == "enum":
        return {"enum": random.sample(["red", "green", "蓝", 7, None, True, "a b"], random.randint(1, 4))}
    if kind == "integer":
        low = random.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 99)}
    if kind == "string":
        return {"type": "string", "maxLength": random.randint(1, 8)}
    if kind == "array":
        least = random.randint(0, 2)
        return {"type": "array", "items": schema(random, depth - 1), "minItems": least, "maxItems": least + 1}
    if kind == "object":
        names = random.sample(["name", "age", "ok", "颜色", "x y"], random.randint(1, 3))
        properties = {name: schema(random, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    return {"type": kind}


@pytest.mark.parametrize("count", [8, slow(40)])
def test_every_answer_to_a_schema_is_valid(live: Running, count: int) -> None:
    generator = random.Random(5)
    schemas: list[dict[str, Any]] = [
        {"type": "object", "properties": {"a": schema(generator)}, "required": ["a"]} for _ in range(count)
    ]
    for drawn in schemas:
        drawn["additionalProperties"] = False

    def ask(drawn: dict[str, Any]) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "drawn", "schema": drawn, "strict": True}}
        answer = live.chat("Give me an example.", response_format=form, max_tokens=400, temperature=1.0, seed=3)
        assert answer.choices[0].finish_reason == "stop"
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(16) as pool:
        for drawn, text in zip(schemas, pool.map(ask, schemas), strict=True):
            jsonschema.validate(json.loads(text), drawn)


def test_any_json_object_will_do(live: Running) -> None:
    answer = live.chat("An object, please.", response_format={"type": "json_object"}, max_tokens=400, temperature=0.0)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


def test_a_schema_that_makes_no_sense_is_the_clients_fault(live: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": 3}}}
    status, _, body = live.ask("hi", response_format=form)
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")

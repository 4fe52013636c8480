"""Tool calls: parsed the same however the text is cut; schemas that force a call accept what Qwen writes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtqwen.gateway.api.schemas import Tool
from trtqwen.gateway.api.tool_choice import call_schema
from trtqwen.gateway.tools import CallArguments, CallBegins, Content, Event, ToolCallParser

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a{}[]"\\<>/ é', max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text('ab}"', max_size=3), inner, max_size=2),
    max_leaves=5,
)


def joined(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of each call."""
    content = ""
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallBegins):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert isinstance(event, CallArguments)
            name, arguments = calls[event.index]
            calls[event.index] = (name, arguments + event.text)
    return content, calls


def parse(pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(**options)
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined(events + parser.flush())


def block(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@given(
    st.text("ab <", max_size=5),
    st.lists(
        st.tuples(st.sampled_from(["f", "get_weather"]), st.dictionaries(st.text("k"), JSON_VALUES, max_size=3))
    ),
    st.data(),
)
def test_calls_are_found_wherever_the_text_is_cut(
    text: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    wanted = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    whole = text + "\n" + "\n".join(block(name, arguments) for name, arguments in wanted)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    content, found = parse(pieces)
    assert found == wanted
    assert content == (text + "\n" if text.strip() or not calls else "")


@given(st.text('<tol_ca>/{"name":,arguments}\n ', max_size=60), st.integers(1, 7))
def test_whatever_is_no_call_stays_text(text: str, width: int) -> None:
    pieces = [text[start : start + width] for start in range(0, len(text), width)]
    assert parse(pieces) == parse([text])
    if "<tool_call>" not in text:
        assert parse([text]) == (text, [])


@pytest.mark.parametrize(
    "inner", ["not json", "{}", "[1]", '{"name": 5, "arguments": {}}', '{"name": "f"}', '{"name": "f", "arguments"']
)
def test_a_broken_block_comes_out_unchanged(inner: str) -> None:
    text = f"a <tool_call>{inner}</tool_call> b"
    content, calls = parse(list(text))
    assert calls == []
    assert content.replace(" ", "") == text.replace(" ", "")


def test_keys_in_another_order_are_a_call_too() -> None:
    text = '<tool_call>{"arguments": {"city": "北京"}, "name": "f"}</tool_call>'
    assert parse(list(text)) == ("", [("f", '{"city": "北京"}')])
    assert parse(['<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>']) == ("", [("f", '{"a": 1}')])


@pytest.mark.parametrize("width", [1, 5, 1000])
def test_a_call_that_is_not_closed_ends_with_the_next(width: int) -> None:
    text = block("f", "{}").removesuffix("</tool_call>") + block("g", '{"a": 1}')
    pieces = [text[start : start + width] for start in range(0, len(text), width)]
    assert parse(pieces) == ("", [("f", "{}"), ("g", '{"a": 1}')])


def test_arguments_stream_as_they_come() -> None:
    parser = ToolCallParser()
    assert parser.push('<tool_call>\n{"name": "f", "argum') == []
    [begins, first] = parser.push('ents": {"ci')
    assert isinstance(begins, CallBegins)
    assert begins.name == "f"
    assert first == CallArguments(0, '{"ci')
    assert parser.push('ty": "Bonn"}}\n</tool') == [CallArguments(0, 'ty": "Bonn"}')]
    assert parser.complete == 1


def test_a_forced_call_begins_inside_the_block() -> None:
    assert parse(list('{"name": "f", "arguments": {"a": 1}}'), inside=True) == ("", [("f", '{"a": 1}')])


def tool(name: str, parameters: dict[str, Any] | None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def test_the_schema_of_a_forced_call_keeps_references_within_its_tools() -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "$defs": {"Place": {"type": "string", "minLength": 2}},
    }
    for tools in ([tool("f", parameters)], [tool("g", None), tool("f", parameters)]):
        validator = jsonschema.Draft202012Validator(call_schema(tools))
        assert validator.is_valid({"name": "f", "arguments": {"at": "Rom"}})
        assert not validator.is_valid({"name": "f", "arguments": {"at": "R"}})
        assert not validator.is_valid({"name": "f", "arguments": {}})
        assert not validator.is_valid({"name": "h", "arguments": {"at": "Rom"}})

"""What of JSON Schema is let in: all that xgrammar enforces, nothing that it ignores; and that no check runs long."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from enum import Enum
from time import process_time
from typing import Annotated, Any, Literal, Optional

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, Field

from trtqwen.gateway.api.response_format import schema_guide
from trtqwen.gateway.api.schemas import Function, Tool
from trtqwen.gateway.api.tool_choice import call_schema
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.guide import Guide

A = {"a": {"type": "integer"}}
AB = {**A, "b": {"type": "integer"}}
LOOP = {"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}]}


def an_object(**keywords: Any) -> dict[str, Any]:
    return {"type": "object", **keywords}


def an_array(**keywords: Any) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "integer"}, **keywords}


def a_text(**keywords: Any) -> dict[str, Any]:
    return {"type": "string", **keywords}


# A schema, an answer that breaks it and that xgrammar lets through all the same, and what the refusal names.
IGNORED: list[tuple[dict[str, Any], str, str]] = [
    (an_array(uniqueItems=True), "[1, 1]", "uniqueItems"),
    (an_array(contains={"const": 5}), "[1]", "contains"),
    ({"not": {"type": "integer"}}, "1", "not"),
    ({"type": "integer", "not": {"const": 1}}, "1", "not"),
    ({"type": "integer", "if": {"const": 1}, "then": False}, "1", "if"),
    (an_object(properties=AB, dependentRequired={"a": ["b"]}), '{"a": 1}', "dependentRequired"),
    (an_object(properties=AB, dependentSchemas={"a": {"required": ["b"]}}), '{"a": 1}', "dependentSchemas"),
    ({"type": "number", "multipleOf": 0.5}, "0.3", "multipleOf"),
    ({"type": "integer", "minimum": 1, "multipleOf": 3}, "4", "multipleOf"),
    (an_object(properties={"bb": {}}, propertyNames={"maxLength": 1}), '{"bb": 1}', "propertyNames"),
    (an_object(properties={"aa": {}}, patternProperties={"a": {"type": "null"}}), '{"aa": 1}', "patternProperties"),
    ({"$dynamicRef": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}, '"a"', "dynamicRef"),
    ({"$ref": "#x", "$defs": {"x": {"$anchor": "x", "type": "integer"}}}, '"a"', "only references within it"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}, "minimum": 3}, "1", "'minimum' with '$ref'"),
    ({"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": 0}]}, "3", "'type' with 'anyOf'"),
    (an_object(properties=AB, anyOf=[{"required": ["b"]}]), "{}", "with 'anyOf'"),
    ({"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]}, "7", "allOf"),
    ({"type": "integer", "maximum": 5, "allOf": [{"minimum": 3}]}, "7", "with 'allOf'"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1", "oneOf"),
    ({"enum": [1, 5], "minimum": 3}, "1", "'minimum' with 'enum'"),
    ({"enum": ["a", 1], "type": "integer"}, '"a"', "contradicts type"),
    ({"const": 1, "enum": [2]}, "1", "contradicts type or enum"),
    ({"minLength": 3}, '"a"', "'minLength' at # without a type"),
    ({"minimum": 3}, "1", "'minimum' at # without a type"),
    ({"required": ["a"]}, "{}", "'required' at # without a type"),
    (an_object(required=["c"]), "{}", "'c', which is not among the properties"),
    (an_object(properties=A, required=["c"], additionalProperties=True), '{"a": 1}', "not among the properties"),
    (an_object(additionalProperties=True, minProperties=2), '{"a": 1, "a": 1}', "minProperties"),
    (a_text(pattern="^a+$", maxLength=2), '"aaa"', "'maxLength' with 'pattern'"),
    (a_text(format="date", maxLength=2), '"2020-01-01"', "'maxLength' with 'format'"),
    (a_text(format="date", pattern="^a$"), '"2020-01-01"', "'pattern' with 'format'"),
    *((a_text(pattern=pattern), answer, "lookaround") for pattern, answer in (
        ("^(?!a).$", '"a"'), ("^(?=a)..$", '"bb"'), ("a^b", '"ab"'), ("^a$b", '"ab"'), (r"^\A$", '"A"'),
        ('^"$', '"""'), (r"^\\$", '"\\"'), (r"^\u0022$", '"""'), (r"^[\x22]$", '"""'), ("^\n$", '"\n"'),
    )),
]  # fmt: skip
# A schema with answers that keep to it, and with answers that break it.
ENFORCED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "integer", "minimum": 3, "exclusiveMaximum": 9}, ["3", "8"], ["2", "9", "3.5", "-4", "true"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 2.5}, ["0.1", "2.5"], ["0", "0.0", "-1", "2.6", "3e0"]),
    (a_text(minLength=2, maxLength=3), ['"ab"', '"红红红"'], ['"a"', '"abcd"', "1"]),
    (a_text(pattern="^[a-c]+[^x]$"), ['"aby"'], ['"ax"', '"da"', '"']),
    (a_text(pattern=r"^\[[$^]\]$"), ['"[$]"'], ['"[a]"']),
    (a_text(pattern="^a$|^b{2}$"), ['"a"', '"bb"'], ['"b"']),
    (a_text(format="password", minLength=3), ['"abc"'], ['"ab"']),
    (a_text(format="date"), ['"2020-01-01"'], []),
    (an_array(minItems=1, maxItems=2), ["[1]", "[1, 2]"], ["[]", "[1, 2, 3]", '["a"]']),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, ['[1, "a"]'], ["[1, 2]"]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, ["[1]"], ["[1, 2]", '["a"]']),
    (an_object(properties=AB, required=["b"], additionalProperties=False), ['{"b": 1}'], ["{}", '{"b": 1, "c": 1}']),
    (an_object(properties=AB, minProperties=1, maxProperties=1), ['{"a": 1}'], ["{}", '{"a": 1, "b": 1}']),
    (an_object(properties=A, additionalProperties={"type": "null"}), ['{"c": null}'], ['{"c": 1}', '{"a": null}']),
    (an_object(properties=A, unevaluatedProperties=False), ['{"a": 1}'], ['{"c": 1}']),
    ({"enum": ["a", 1, None]}, ['"a"', "1", "null"], ['"b"', "true"]),
    ({"const": "x", "enum": ["x"], "type": "string", "title": "X"}, ['"x"'], ['"y"']),
    ({"type": ["string", "null"], "enum": ["a", None]}, ["null"], ["1"]),
    ({"type": ["integer", "null"], "minimum": 3}, ["null", "3"], ["2", '"a"']),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}, ["1", "null"], ['"a"']),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, ["1", "null"], ['"a"']),
    ({"allOf": [{"type": "integer", "minimum": 3}], "description": "d"}, ["3"], ["2"]),
    ({"$ref": "#/definitions/x", "definitions": {"x": {"type": "null"}}, "title": "t"}, ["null"], ["1"]),
    ({"properties": A, "x-order": ["a"]}, ['{"a": 1}'], ['{"a": "x"}']),
]


@pytest.fixture(scope="module")
def lets_through() -> Callable[[dict[str, Any], str], bool]:
    """Whether xgrammar's grammar of a schema takes a text, byte by byte."""
    xgrammar = pytest.importorskip("xgrammar")
    vocabulary = [bytes([byte]) for byte in range(256)] + [b""]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def judge(schema: dict[str, Any], text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema), any_whitespace=False))
        return bool(matcher.accept_string(text) and matcher.accept_token(256))

    return judge


@pytest.mark.parametrize(("schema", "answer", "named"), IGNORED)
def test_what_the_grammar_ignores_is_refused(
    lets_through: Callable[[dict[str, Any], str], bool], schema: dict[str, Any], answer: str, named: str
) -> None:
    with pytest.raises(ApiError) as caught:
        schema_guide(schema, "response_format")
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "response_format", "unsupported")
    assert named in caught.value.message
    assert lets_through(schema, answer)  # or else it need not be refused any more


@pytest.mark.parametrize(("schema", "right", "wrong"), ENFORCED)
def test_what_the_grammar_enforces_is_let_in(
    lets_through: Callable[[dict[str, Any], str], bool], schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    guide = schema_guide(schema, "response_format")
    for answer in right:
        assert lets_through(schema, answer), answer
        assert guide.allows(answer)
    for answer in wrong:
        assert not lets_through(schema, answer), answer
        assert "pattern" in schema or not guide.allows(answer), answer  # patterns are the grammar's alone


@pytest.mark.parametrize("others", [0, 2])
def test_a_forced_call_is_held_to_parameters_that_refer(
    lets_through: Callable[[dict[str, Any], str], bool], others: int
) -> None:
    definitions = {"$defs": {"Place": a_text(minLength=2)}}
    named = {"at": {"$ref": "#/$defs/Place"}}
    parameters = an_object(properties=named, required=["at"], additionalProperties=False, **definitions)
    functions = [Function(name=f"g{number}") for number in range(others)]
    functions.append(Function(name="f", parameters=parameters))
    schema = call_schema([Tool(type="function", function=function) for function in functions])
    guide = schema_guide(schema, "tools")
    for answer, right in (("Rom", True), ("R", False)):
        text = json.dumps({"name": "f", "arguments": {"at": answer}})
        assert lets_through(schema, text) == guide.allows(text) == right


def test_a_tool_without_parameters_gets_none(lets_through: Callable[[dict[str, Any], str], bool]) -> None:
    schema = call_schema([Tool(type="function", function=Function(name="now"))])
    for arguments, right in (({}, True), ({"a": 1}, False)):
        assert lets_through(schema, json.dumps({"name": "now", "arguments": arguments})) == right


def test_a_key_with_escapes_is_found_out_afterwards(lets_through: Callable[[dict[str, Any], str], bool]) -> None:
    schema, answer = an_object(properties=A, additionalProperties={"type": "string"}), '{"\\u0061": "x"}'
    assert lets_through(schema, answer)
    assert not schema_guide(schema, "x").allows(answer)


@pytest.mark.parametrize(
    ("schema", "code", "text"),
    [
        (an_object(properties=3), "invalid_value", "properties at # has a wrong value"),
        ({"type": []}, "invalid_value", "type at # has"),
        (an_object(properties={"a": {"items": [3]}}), "invalid_value", "items at #/properties/a has"),
        ({"anyOf": [3]}, "invalid_value", "#/anyOf/0 is neither"),
        ({"minItems": -1}, "invalid_value", "minItems"),
        (an_object(properties=A, required=["a", "a"]), "invalid_value", "required"),
        ({"$ref": "#/title", "title": {"type": "integer"}}, "invalid_value", "no schema"),
        ({"$ref": "#/$defs/none"}, "unsupported", "does not find"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/0"}]}, "unsupported", "does not find"),
        ({"$ref": "other.json"}, "unsupported", "only references within it"),
        ({"$ref": "#"}, "unsupported", "for itself"),
        ({"$ref": "#/$defs/x", "$defs": {"x": LOOP}}, "unsupported", "for itself"),
        (an_object(properties={"a": {"$id": "http://a/b"}}), "unsupported", "'\\$id' at #/properties/a"),
        (an_object(additionalProperites=False), "unsupported", "'additionalProperites'"),
    ],
)
def test_schemas_that_make_no_sense_are_refused(schema: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(ApiError, match=text) as caught:
        schema_guide(schema, "tools")
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, "tools")


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9, default=9)


class Dog(BaseModel):
    kind: Literal["dog", "hound"]
    tricks: list[str] = Field(max_length=3)


class Node(BaseModel):
    """Everything that pydantic writes without being asked for more."""

    name: str = Field(min_length=1, max_length=8, description="of the node")
    color: Color | None = None
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    either: int | str | list[float] = 3
    born: date | None = None
    pair: tuple[int, str] = (1, "a")
    counts: dict[str, int] = {}
    fixed: Literal[3] = 3
    children: list[Node] = []
    next: Optional[Node] = None  # noqa: UP045


class StrictNode(BaseModel):
    value: float | None
    color: Color
    pets: list[Cat | Dog]
    next: StrictNode | None


@pytest.mark.parametrize("schema", [Node.model_json_schema(), to_strict_json_schema(StrictNode)])
def test_schemas_of_pydantic_and_openai_are_let_in(
    lets_through: Callable[[dict[str, Any], str], bool], schema: dict[str, Any]
) -> None:
    guide = schema_guide(schema, "response_format")
    inner: Any = Node(name="b", next=Node(name="c"), pet=Cat(kind="cat")).model_dump(mode="json")
    answer = json.dumps({"name": "a", "children": [inner], "next": None})
    if "StrictNode" in json.dumps(schema):
        strict = {"value": 1.5, "color": "red", "pets": [{"kind": "dog", "tricks": []}], "next": None}
        answer = json.dumps({**strict, "next": strict})
    assert lets_through(schema, answer)
    assert guide.allows(answer)
    assert not guide.allows(answer.replace('"next": null', '"next": 3'))


SCALARS: Any = (
    st.none() | st.booleans() | st.integers(-3, 12) | st.sampled_from([0.5, 2.0]) | st.text("ab", max_size=4)
)
VALUES: Any = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
BOUND: Any = st.integers(0, 3)


def some(**keywords: Any) -> Any:
    return st.fixed_dictionaries({}, optional=keywords)


def larger(inner: Any) -> Any:
    return st.one_of(
        some(type=st.just("object"), properties=st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
             required=st.lists(st.sampled_from("abc"), unique=True, max_size=2),
             additionalProperties=inner | st.booleans(), unevaluatedProperties=inner,
             minProperties=BOUND, maxProperties=BOUND),
        some(type=st.just("array"), items=inner | st.booleans(), prefixItems=st.lists(inner, min_size=1, max_size=2),
             minItems=BOUND, maxItems=BOUND),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=1)}),
        st.just({"$ref": "#/$defs/tree"}),
    )  # fmt: skip


TYPES = st.sampled_from(["object", "array", "string", "boolean", "null", "number", "integer"])
SCHEMAS: Any = st.recursive(
    some(type=TYPES | st.lists(TYPES, min_size=1, unique=True), minimum=BOUND, maximum=BOUND, exclusiveMinimum=BOUND,
         exclusiveMaximum=BOUND, minLength=BOUND, maxLength=BOUND)
    | st.fixed_dictionaries({"enum": st.lists(VALUES, min_size=1, max_size=3)})
    | st.fixed_dictionaries({"const": VALUES}),
    larger,
    max_leaves=5,
)  # fmt: skip
TREE = an_object(properties={"a": {"$ref": "#/$defs/tree"}, "b": {"type": ["integer", "null"]}})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SCHEMAS, st.lists(VALUES, min_size=3, max_size=8))
def test_answers_are_judged_as_jsonschema_judges(schema: dict[str, Any], values: list[Any]) -> None:
    schema = {**schema, "$defs": {"tree": TREE}}
    guide, judge = Guide(json.dumps(schema)), jsonschema.Draft202012Validator(schema)
    for value in values:
        assert guide.allows(json.dumps(value)) == judge.is_valid(value), value


def doubled(keyword: str, count: int) -> dict[str, Any]:
    """Stands for 2**count schemas."""
    steps = {f"a{n}": {keyword: [{"$ref": f"#/$defs/a{n - 1}"}] * 2} for n in range(1, count + 1)}
    return {"$ref": f"#/$defs/a{count}", "$defs": {"a0": {"type": "string"}, **steps}}


WIDE = {f"p{n}": {"type": "integer"} for n in range(1800)}
TWICE = an_object(properties={"n": {"$ref": "#/$defs/t"}, "v": {"type": "integer"}})


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 1, "if": {"$ref": "#/$defs/a40"}, **doubled("allOf", 40)},
        doubled("anyOf", 40),
        doubled("allOf", 40),
        {"required": [name for n in range(4000) for name in (n, str(n))]},
        {"anyOf": [{"$ref": f"#/$defs/{'a' * 9000}"}] * 5, "$defs": {"a" * 9000: {"required": WIDE}}},
        an_object(properties={"a" * 30_000: an_object(properties={f"p{n}": {"not": {}} for n in range(2000)})}),
        {"oneOf": [{"$ref": f"#/$defs/{n}"} for n in range(900)],
         "$defs": {str(n): an_object(properties=A, required=["a"]) for n in range(500)}},
    ],
)  # fmt: skip
def test_schemas_made_to_take_long_are_refused_at_once(schema: dict[str, Any]) -> None:
    began = process_time()
    with pytest.raises(ApiError) as caught:
        schema_guide(schema, "x")
    assert caught.value.status == 400
    assert process_time() - began < 0.5


@pytest.mark.parametrize("text", ["[", "[^", "[\\\\", "\\\\", "|", "a$"])
def test_no_pattern_takes_long_to_look_at(text: str) -> None:
    began = process_time()
    with suppress(ApiError):
        schema_guide(a_text(pattern=text * (30_000 // len(text))), "x")
    assert process_time() - began < 0.5


def nested(depth: int, last: Any) -> Any:
    for _ in range(depth):
        last = {"n": last}
    return last


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        # Each level may be any of four, and is none: 4**60 ways without a bound.
        ({"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [TWICE] * 4}}}, nested(60, {"v": "x"})),
        (an_array(items={"enum": [f"v{n}" for n in range(6000)]}), ["v5999"] * 8000),
        (an_array(items={"anyOf": [{"enum": [[0] * 200 + [n]]} for n in range(80)]}), [[0] * 200 + [79]] * 40),
        (an_array(items={"anyOf": [{"const": n} for n in range(900)]}), [899] * 8000),
        (an_array(items=an_object(properties=WIDE)), [{"p1": 1}] * 8000),
    ],
)
def test_no_answer_takes_long_to_check(schema: dict[str, Any], value: Any) -> None:
    guide, answer = schema_guide(schema, "x"), json.dumps(value)
    began = process_time()
    guide.allows(answer)
    assert process_time() - began < 1


def test_lists_and_trees_are_checked_to_their_depth() -> None:
    tree = an_object(properties={"v": {"type": "integer"}, "n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}})
    guide = schema_guide(tree, "x")
    assert guide.allows(json.dumps(nested(100, {"v": 1})))
    assert not guide.allows(json.dumps(nested(100, {"v": "x"})))
    wide = schema_guide({"$ref": "#/$defs/t", "$defs": {"t": an_array(items={"$ref": "#/$defs/t"})}}, "x")
    assert wide.allows(json.dumps([[[]] * 10] * 1000))
    assert not wide.allows(json.dumps([[[]] * 10] * 1000 + [1]))

"""The tools of a chat, the forced ones, and the guide that enforces them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtqwen.gateway.api.response_format import require_guides, require_structural_tags, schema_guide
from trtqwen.gateway.api.schemas import AllowedTools, ChatRequest, NamedTool, Tool
from trtqwen.gateway.errors import ApiError, bad_request
from trtqwen.gateway.generation.guide import Guide
from trtqwen.gateway.generation.schema_check import loosened
from trtqwen.gateway.model import ServedModel
from trtqwen.gateway.tools import CLOSE, OPEN

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_PARAMETERS = {"type": "object"}


@dataclass(frozen=True)
class OfferedTools:
    """The tools of a request.

    Attributes:
        told: tools that the model sees.
        forced: of which it must call one.
        named: it must call this one, which to OpenAI is a regular end of the answer.
    """

    told: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()
    named: bool = False


def offered_tools(request: ChatRequest) -> OfferedTools:
    """The tools that a request offers.

    Raises:
        ApiError: if `tool_choice` asks for a tool that is not there.
    """
    tools, choice = tuple(request.tools or ()), request.tool_choice
    if choice == "none":
        return OfferedTools()
    if choice is None or choice == "auto":
        return OfferedTools(tools)
    if not tools:
        raise bad_request("tool_choice asks for a call, but there are no tools; add them", param="tool_choice")
    if isinstance(choice, AllowedTools):
        allowed = tuple(_named(tools, tool) for tool in choice.allowed_tools.tools)
        return OfferedTools(allowed, allowed if choice.allowed_tools.mode == "required" else ())
    if isinstance(choice, NamedTool):
        return OfferedTools(tools, (_named(tools, choice),), named=True)
    return OfferedTools(tools, tools)


def _named(tools: Sequence[Tool], choice: NamedTool) -> Tool:
    for tool in tools:
        if tool.function.name == choice.function.name:
            return tool
    raise bad_request(
        f"tool_choice names {choice.function.name!r}, which is not a tool of the request", param="tool_choice"
    )


def call_guide(model: ServedModel, tools: Sequence[Tool]) -> Guide:
    """Return the guide for one call, as written between the tags.

    For a tool that is not `strict`, parameters that the grammar cannot express are not enforced.

    Raises:
        ApiError: if the engine cannot be guided, or not by the parameters of a strict tool.
    """
    require_guides(model, "tool_choice")
    try:
        return schema_guide(call_schema(tools), "tools")
    except ApiError:
        if any(tool.function.strict for tool in tools):
            raise
        return schema_guide(call_schema(tools, any_arguments=True), "tools")


def calls_or_answer(model: ServedModel, tools: Sequence[Tool], answer: Guide, *, one_call: bool) -> Guide:
    """Return the guide for calls of tools, or for another form.

    Args:
        answer: the form; of JSON schemas alone.

    Raises:
        ApiError: if the engine cannot be guided so.
    """
    if answer.kind != "json_schema":
        raise bad_request("only JSON goes together with tools; leave out the tools", param="response_format")
    tags = [
        {
            "type": "tag",
            "begin": f'{OPEN}\n{{"name": {json.dumps(tool.function.name, ensure_ascii=False)}, "arguments": ',
            "content": {"type": "json_schema", "json_schema": _arguments_schema(tool)},
            "end": f"}}\n{CLOSE}",
        }
        for tool in tools
    ]
    calls = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": "\n",
        "at_least_one": True,
        "stop_after_first": one_call,
    }
    form = {"type": "or", "elements": [{"type": "json_schema", "json_schema": json.loads(answer.text)}, calls]}
    text = json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)
    return require_structural_tags(model, Guide(text, "structural_tag", schema=answer.text), "response_format")


def call_schema(tools: Sequence[Tool], *, any_arguments: bool = False) -> dict[str, Any]:
    """JSON schema of a call to any of the tools, as written between the tags."""
    calls: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        parameters = _ANY_PARAMETERS if any_arguments else _arguments_schema(tool)
        calls[str(number)] = {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": _moved(parameters, f"#/$defs/{number}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
    # Not a list of the calls themselves: the grammar cannot follow a reference into one.
    return {"anyOf": [{"$ref": f"#/$defs/{number}"} for number in calls], "$defs": calls}


def _arguments_schema(tool: Tool) -> Any:
    parameters = tool.function.parameters
    if not parameters:
        return _NO_PARAMETERS
    if tool.function.strict:
        return parameters
    loose = loosened(parameters)
    told = isinstance(loose, dict) and {"type", "properties", "$ref", "anyOf", "allOf"} & loose.keys()
    return loose if told else _ANY_PARAMETERS


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to its root are valid at another place."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else moved
            for key, value in schema.items()
            for moved in (_moved(value, place),)
        }
    return [_moved(value, place) for value in schema] if isinstance(schema, list) else schema

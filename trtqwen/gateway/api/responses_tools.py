"""Tools of `/v1/responses`: their functions for the model, and its calls for the client.

A custom tool takes plain text: for the model it is a function with one text argument. A namespace groups tools: their
names for the model contain both names. Tools that OpenAI's servers run and that clients offer by default, such as web
search, are ignored, and `x-trtqwen-ignored` names them. Other tools that run on a server are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtqwen.gateway.errors import unsupported

_OFFERED_BY_DEFAULT = ("web_search", "tool_search", "image_generation")
_FUNCTION_FIELDS = ("description", "parameters", "strict")
_INPUT = "input"
_TEXT_INPUT = {
    "type": "object",
    "properties": {_INPUT: {"type": "string"}},
    "required": [_INPUT],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class ResponseTool:
    """A tool of a request.

    Attributes:
        name, namespace: by which the client knows it.
        custom: it takes plain text.
        fields: of the tool's function for the model, besides its name.
    """

    name: str
    namespace: str | None
    custom: bool
    fields: Mapping[str, Any]

    @property
    def told(self) -> str:
        """The tool's name for the model."""
        return told_name(self.name, self.namespace)


def told_name(name: Any, namespace: Any) -> str:
    """Return the name of a tool for the model."""
    return f"{namespace}__{name}" if namespace else str(name)


def offered_by_default(tool: Mapping[str, Any]) -> bool:
    """Whether a tool is one that OpenAI's servers run, and that clients offer without being asked."""
    return str(tool.get("type")).startswith(_OFFERED_BY_DEFAULT)


def response_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, ResponseTool]:
    """The tools of a request by the names that the model knows.

    Raises:
        ApiError: naming the tool, if it is of a kind that no client runs.
    """
    return {tool.told: tool for index, given in enumerate(tools) for tool in _read(given, f"tools[{index}]")}


def _read(tool: Mapping[str, Any], place: str, namespace: str | None = None) -> Iterator[ResponseTool]:
    kind, name = tool.get("type"), str(tool.get("name", ""))
    if kind == "namespace" and namespace is None:
        for index, inner in enumerate(tool.get("tools") or ()):
            yield from _read(inner, f"{place}.tools[{index}]", name)
    elif kind == "function":
        fields = {key: tool[key] for key in _FUNCTION_FIELDS if tool.get(key) is not None}
        yield ResponseTool(name, namespace, custom=False, fields=fields)
    elif kind == "custom":
        if (tool.get("format") or {}).get("type", "text") != "text":
            raise unsupported("tools", f"{place}: custom tools take plain text here; leave out the format")
        described = {"description": tool["description"]} if tool.get("description") else {}
        yield ResponseTool(name, namespace, custom=True, fields={**described, "parameters": _TEXT_INPUT})
    elif not offered_by_default(tool):
        raise unsupported("tools", f"{place} is of type {kind!r}; only tools that the client runs work")


def custom_arguments(text: Any) -> str:
    """The arguments of a custom tool's function for its text."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The text in the arguments of a custom tool's function; of arguments that hold none, all of them."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = given.get(_INPUT) if isinstance(given, dict) else None
    return text if isinstance(text, str) else arguments

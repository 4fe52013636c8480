"""Qwen's tool calls: `<tool_call>` blocks in an answer, taken apart while they stream, and schemas that force one."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from trtqwen.gateway.api.schemas import Tool
from trtqwen.gateway.generation.text import held_back

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL)

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_LONGEST_HEADER = 4096  # characters; a block that is no call must not be searched again with every token


@dataclass(frozen=True)
class Content:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A call's function is known; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """Part of a call's arguments, JSON text as the model wrote it."""

    index: int
    text: str


Event = Content | CallBegins | CallArguments


class _State(Enum):
    CONTENT = "content"
    HEADER = "header"
    ARGUMENTS = "arguments"
    TAIL = "tail"


class ToolCallParser:
    """Takes an answer's text piece by piece. How it is cut into pieces does not change what comes out, joined.

    A block that is no call comes out as content, unchanged. White space before a call is dropped.

    Args:
        inside: the text begins inside a block, as when the prompt ends with `<tool_call>`.

    Attributes:
        calls: how many have begun.
        complete: how many have ended.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._state = _State.HEADER if inside else _State.CONTENT
        self._text = ""
        self._scanner = _ObjectScanner()
        self.calls = 0
        self.complete = 0

    def push(self, text: str) -> list[Event]:
        self._text += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def flush(self) -> list[Event]:
        """What the rest amounts to, at the end of the answer."""
        events: list[Event] = []
        rest, self._text = self._text, ""
        if self._state is _State.CONTENT:
            events += [Content(rest)] if rest.strip() or not self.calls else []
        elif self._state is _State.HEADER:
            events += self._whole(rest, closed=False)
        return [event for event in events if event != Content("")]

    def _step(self, events: list[Event]) -> bool:
        """Go on by one part; False when more text is needed."""
        if self._state is _State.CONTENT:
            return self._content(events)
        if self._state is _State.HEADER:
            return self._header(events)
        if self._state is _State.ARGUMENTS:
            return self._arguments(events)
        return self._tail()

    def _tail(self) -> bool:
        """Behind a call: up to its end, or to the next call where a model forgets to end the one before."""
        end, begin = self._text.find(CLOSE), self._text.find(OPEN)
        if end >= 0 and (begin < 0 or end < begin):
            self._leave(end + len(CLOSE))
        elif begin >= 0:
            self._leave(begin)
        else:
            return False
        return True

    def _content(self, events: list[Event]) -> bool:
        start = self._text.find(OPEN)
        sure = start if start >= 0 else len(self._text) - held_back(self._text, OPEN)
        content = self._text[:sure].rstrip()
        if content:
            events.append(Content(content))
        if start < 0:
            self._text = self._text[len(content) :]
            return False
        self._text = self._text[start + len(OPEN) :]
        self._state = _State.HEADER
        return True

    def _header(self, events: list[Event]) -> bool:
        if len(self._text) <= _LONGEST_HEADER and (match := _HEADER.match(self._text)):
            name = _json_string(match[1])
            if name is not None:
                self._begin(name, events)
                self._text = self._text[match.end() :]
                self._scanner = _ObjectScanner()
                self._state = _State.ARGUMENTS
                return True
        end = self._text.find(CLOSE)
        if end < 0:
            return False
        events += self._whole(self._text[:end], closed=True)
        self._leave(end + len(CLOSE))
        return True

    def _arguments(self, events: list[Event]) -> bool:
        length = self._scanner.scan(self._text)
        if length:
            events.append(CallArguments(self.calls - 1, self._text[:length]))
        self._text = self._text[length:]
        if not self._scanner.complete:
            return False
        self.complete += 1
        self._state = _State.TAIL
        return True

    def _whole(self, block: str, *, closed: bool) -> list[Event]:
        """A block that does not begin as calls do: a call with its keys in another order, or none at all."""
        events: list[Event] = []
        try:
            call = json.loads(block)
            name, arguments = call["name"], call["arguments"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return [Content(OPEN + block + (CLOSE if closed else ""))]
        if not isinstance(name, str):
            return [Content(OPEN + block + (CLOSE if closed else ""))]
        self._begin(name, events)
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        events.append(CallArguments(self.calls - 1, text))
        self.complete += 1
        return events

    def _begin(self, name: str, events: list[Event]) -> None:
        events.append(CallBegins(self.calls, f"call_{secrets.token_hex(12)}", name))
        self.calls += 1

    def _leave(self, length: int) -> None:
        self._text = self._text[length:]
        self._state = _State.CONTENT


class _ObjectScanner:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.complete = False

    def scan(self, text: str) -> int:
        """How many characters belong to the object."""
        for position, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return position + 1
        return len(text)


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """JSON schema of a call to any of the tools, as it stands between the tags."""
    calls: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        arguments = _moved(tool.function.parameters or _NO_PARAMETERS, f"#/$defs/{number}/properties/arguments")
        calls[str(number)] = {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
    # Not a list of the calls themselves: the grammar cannot follow a reference into one.
    return {"anyOf": [{"$ref": f"#/$defs/{number}"} for number in calls], "$defs": calls}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own root hold at another place."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else moved
            for key, value in schema.items()
            for moved in (_moved(value, place),)
        }
    return [_moved(value, place) for value in schema] if isinstance(schema, list) else schema


def _json_string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None

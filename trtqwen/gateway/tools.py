"""Qwen's tool calls: parse `<tool_call>` blocks in an answer while they stream."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from trtqwen.hf.text_stream import held_back

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
_FIRST_KEYS = ('"name"', '"arguments"', '"parameters"', '"id"', '"type"', '"function"')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SPACE = re.compile(r"\s*")
_LEFTOVERS = re.compile(r"[\s}\],]*")  # what stands between the calls of a block, and behind the last
_LONGEST_NAME = 1024  # characters; longer text in quotation marks is not the name of a function
_LONGEST_WHOLE = 64 << 10  # characters of a call that is read whole, as one with its arguments before its name
_SURELY_A_TAG = len("<tool_")  # so much of the tag, at the end of an answer that a limit cuts, is not text


class Content(NamedTuple):
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
    HEADER = "header"  # of a call, up to its arguments
    ARGUMENTS = "arguments"
    REST = "rest"  # of a call, behind its arguments
    BETWEEN = "between"  # behind a call, in its block


class _NoCall(Exception):
    pass


class _NeedsMore(Exception):
    pass


class ToolCallParser:
    """Parses an answer's text piece by piece. The joined result does not depend on the pieces.

    A block holds one call, several calls, or a list of calls. Text outside of calls stays unchanged, and so does a
    block that is not a call. White space alone between calls, before the first or after the last call is dropped.

    Args:
        inside: the text begins inside a block, as when the prompt ends with `<tool_call>`.

    Attributes:
        calls: how many have begun.
        complete: how many have ended.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._state = _State.HEADER if inside else _State.CONTENT
        self._text = ""  # not taken apart yet
        self._opening = ""  # what has been read of a block in front of `_text`, and comes out if there is no call
        self._in_block = inside  # the next closing tag belongs to a call
        self._space = ""  # white space that begins a stretch of text
        self._in_stretch = False  # text has come out since the last call
        self._scanner = _ObjectScanner()
        self._scanned = 0
        self.calls = 0
        self.complete = 0

    def push(self, text: str) -> list[Event]:
        self._text += text
        events: list[Event] = []
        try:
            while self._step(events):
                pass
        except _NeedsMore:
            pass
        return events

    def flush(self, *, cut: bool = False) -> list[Event]:
        """Return the rest at the end of the answer.

        Args:
            cut: a limit ended the answer: the beginning of a call is not text.
        """
        events: list[Event] = []
        rest, self._text = self._text, ""
        if self._state is _State.CONTENT:
            held = max(held_back(rest, tag) for tag in (OPEN, CLOSE))
            self._emit(rest[: len(rest) - held] if cut and held >= _SURELY_A_TAG else rest, events)
        elif self._state is _State.HEADER and not cut:
            self._emit(self._opening + rest, events)
        if not self.calls and self._space:
            events.append(Content(self._space))
        return events

    def _step(self, events: list[Event]) -> bool:
        """Parse one part; False if more text is needed."""
        if self._state is _State.CONTENT:
            return self._content(events)
        if self._state is _State.HEADER:
            try:
                return self._header(events)
            except _NoCall:
                self._emit(self._opening, events)
                self._state = _State.CONTENT
                return True
        if self._state is _State.ARGUMENTS:
            return self._arguments(events)
        return self._rest() if self._state is _State.REST else self._between()

    def _content(self, events: list[Event]) -> bool:
        tags = (OPEN, CLOSE) if self._in_block else (OPEN,)
        found = [(start, tag) for tag in tags if (start := self._text.find(tag)) >= 0]
        if not found:
            sure = len(self._text) - max(held_back(self._text, tag) for tag in tags)
            self._emit(self._text[:sure], events)
            self._text = self._text[sure:]
            return False
        start, tag = min(found)
        self._emit(self._text[:start], events)
        self._text = self._text[start + len(tag) :]
        self._in_block = False
        if tag == OPEN:
            self._open(OPEN)
        return True

    def _open(self, opening: str) -> None:
        self._opening = opening
        self._scanner, self._scanned = _ObjectScanner(), 0
        self._state = _State.HEADER

    def _header(self, events: list[Event]) -> bool:
        begin = _skip(self._text, 0)
        if self._text[begin] == "[" and "[" not in self._opening:
            self._opening += self._text[: begin + 1]
            self._text = self._text[begin + 1 :]
            return True
        if self._text[begin] != "{":
            raise _NoCall
        header = _read_header(self._text, begin)
        if header is None:
            return self._whole(begin, events)
        name, end = header
        self._begin(name, events)
        self._text = self._text[end:]
        self._scanner = _ObjectScanner()
        self._state = _State.ARGUMENTS
        return True

    def _whole(self, begin: int, events: list[Event]) -> bool:
        """A call that does not begin with its name, or whose arguments are no object: known when it is complete."""
        self._scanned = self._scanned or begin
        self._scanned += self._scanner.scan(self._text[self._scanned :])
        if not self._scanner.complete:
            if self._scanned > _LONGEST_WHOLE or self._scanner.broken:
                raise _NoCall
            return False
        name, arguments = _as_call(self._text[begin : self._scanned])
        self._begin(name, events)
        events.append(CallArguments(self.calls - 1, arguments))
        self.complete += 1
        self._text = self._text[self._scanned :]
        self._state = _State.BETWEEN
        return True

    def _arguments(self, events: list[Event]) -> bool:
        length = self._scanner.scan(self._text)
        if length:
            events.append(CallArguments(self.calls - 1, self._text[:length]))
        self._text = self._text[length:]
        if self._scanner.broken:  # where a model forgets the end of the arguments
            tag = self._tag_at_start((OPEN, CLOSE))
            if not tag:
                events.append(CallArguments(self.calls - 1, self._text[0]))
                self._text, self._scanner.broken = self._text[1:], False
                return True
        elif not self._scanner.complete:
            return False
        self.complete += 1
        self._state = _State.BETWEEN if self._scanner.broken else _State.REST
        self._scanner = _ObjectScanner(depth=1)
        return True

    def _rest(self) -> bool:
        """To the end of the call's own object, or to a tag where a model forgets that end."""
        length = self._scanner.scan(self._text)
        self._text = self._text[length:]
        if self._scanner.complete or self._scanner.broken:
            self._state = _State.BETWEEN
            return True
        return False

    def _between(self) -> bool:
        match = _LEFTOVERS.match(self._text)
        self._text = self._text[match.end() if match else 0 :]
        if not self._text:
            return False
        if self._text.startswith("{"):
            self._open("")
            self._in_block = True
            return True
        tag = self._tag_at_start((OPEN, CLOSE))
        self._text = self._text[len(tag) :]
        self._in_block = not tag
        self._state = _State.CONTENT
        if tag == OPEN:
            self._open(OPEN)
        return True

    def _tag_at_start(self, tags: tuple[str, ...]) -> str:
        """The tag that the text begins with, if any.

        Raises:
            _NeedsMore: if the text is the beginning of one.
        """
        for tag in tags:
            if self._text.startswith(tag):
                return tag
            if tag.startswith(self._text):
                raise _NeedsMore
        return ""

    def _begin(self, name: str, events: list[Event]) -> None:
        events.append(CallBegins(self.calls, f"call_{secrets.token_hex(12)}", name))
        self.calls += 1
        self._in_block = True
        self._space, self._in_stretch = "", False

    def _emit(self, text: str, events: list[Event]) -> None:
        text = self._space + text
        if self._in_stretch or not text.isspace():
            self._space = ""
            self._in_stretch = self._in_stretch or bool(text)
            if text:
                events.append(Content(text))
        else:
            self._space = text


class _ObjectScanner:
    """Finds where a JSON object ends that comes in pieces.

    Attributes:
        complete: the end was found.
        broken: a tag begins outside of the object's strings.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False
        self.complete = self.broken = False

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
                if self._depth <= 0:
                    self.complete = True
                    return position + 1
            elif character == "<":
                self.broken = True
                return position
        return len(text)


def _read_header(text: str, begin: int) -> tuple[str, int] | None:
    """The name of a call and where its arguments begin; None if only the whole object can tell.

    Args:
        begin: of the call's object.

    Raises:
        _NoCall: if the object is not a call.
        _NeedsMore: if its beginning may become one.
    """
    start = _skip(text, begin + 1)
    beginning = text[start : start + max(map(len, _FIRST_KEYS))]
    if not any(beginning.startswith(key) for key in _FIRST_KEYS):
        if any(key.startswith(beginning) for key in _FIRST_KEYS):
            raise _NeedsMore
        raise _NoCall
    if not beginning.startswith('"name"'):
        return None
    name, end = _string(text, _skip(text, _expect(text, ":", start + len('"name"'))))
    if not name:
        raise _NoCall
    key, end = _string(text, _skip(text, _expect(text, ",", end)))
    if key not in ("arguments", "parameters"):
        return None
    end = _skip(text, _expect(text, ":", end))
    return (name, end) if text[end] == "{" else None


def _as_call(text: str) -> tuple[str, str]:
    """Name and arguments of a call's whole object.

    Raises:
        _NoCall: if it is not a call.
    """
    try:
        call = json.loads(text, strict=False)
        call = call if "name" in call else call["function"]
        name = call["name"]
        arguments = call["arguments"] if "arguments" in call else call["parameters"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _NoCall from None
    if not isinstance(name, str) or not name:
        raise _NoCall
    return name, arguments_text(arguments)


def arguments_text(arguments: Any) -> str:
    """A call's arguments as JSON text, as OpenAI has them: of a call without any, an empty object."""
    if arguments is None:
        return "{}"
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    end = match.end() if match else position
    if end >= len(text):
        raise _NeedsMore
    return end


def _expect(text: str, character: str, position: int) -> int:
    position = _skip(text, position)
    if text[position] != character:
        raise _NoCall
    return position + 1


def _string(text: str, position: int) -> tuple[str, int]:
    if text[position] != '"':
        raise _NoCall
    match = _STRING.match(text, position)
    if match is None:
        if len(text) - position > _LONGEST_NAME:
            raise _NoCall
        raise _NeedsMore
    try:
        return json.loads(match[0], strict=False), match.end()
    except ValueError:
        raise _NoCall from None

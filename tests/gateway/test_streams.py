"""10,000 outputs as models write them, and as they garble them: cut anywhere, they come out the same."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.slow import every
from trtqwen.gateway.api.reasoning import ReasoningParser
from trtqwen.gateway.tools import CLOSE, OPEN, CallArguments, CallBegins, Content, Event, ToolCallParser

OUTPUTS = 10_000
NAMES = ("get_weather", "mcp/server.tool", "天气", "a b", 'q"uote', "x" * 128)
TEXTS = (
    "",
    "Let me see.",
    "\n",
    " \n\n",
    "```json\n",
    "the <tool_call> tag",
    "<think>",
    "a < b",
    "</tool_call>",
    "é🙂",
)
SPLICES = (
    "<",
    ">",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "\n",
    ",",
    OPEN,
    CLOSE,
    "</tool",
    "<tool_call",
    '{"name": "',
    "null",
)
Found = tuple[str, str, list[list[str]], int]


def value(generator: random.Random, depth: int = 2) -> Any:
    kinds = [None, True, 3, -0.5, "", "a}b{", "</tool_call>", 'say "<tool_call>"', "\\", "北京"]
    if depth and generator.random() < 0.4:
        if generator.random() < 0.5:
            return [value(generator, depth - 1) for _ in range(generator.randint(0, 2))]
        return {
            generator.choice(("a", "b", "}")): value(generator, depth - 1) for _ in range(generator.randint(0, 2))
        }
    return generator.choice(kinds)


def call(generator: random.Random) -> tuple[str, tuple[str, str]]:
    """A call as text, in one of the orders that models write, and what it amounts to."""
    name = generator.choice(NAMES)
    arguments = {"k": value(generator)} if generator.random() < 0.8 else {}
    text = json.dumps(arguments, ensure_ascii=generator.random() < 0.3)
    fields = [f'"name": {json.dumps(name, ensure_ascii=False)}', f'"arguments": {text}']
    if generator.random() < 0.2:
        fields.reverse()
    if generator.random() < 0.1:
        fields.append('"id": 7')
    return "{" + ", ".join(fields) + "}", (name, text)


def block(generator: random.Random) -> tuple[str, list[tuple[str, str]]]:
    calls = [call(generator) for _ in range(generator.choice((1, 1, 1, 2, 3)))]
    texts = [text for text, _ in calls]
    form = generator.choice(("lines", "lines", "list"))
    inner = "[" + ", ".join(texts) + "]" if form == "list" else "\n".join(texts)
    return f"{OPEN}\n{inner}\n{CLOSE}", [wanted for _, wanted in calls]


def output(generator: random.Random) -> tuple[str, str, list[tuple[str, str]]]:
    """A well-formed output: its text, what of it is content, and its calls."""
    whole = content = ""
    calls: list[tuple[str, str]] = []
    for _ in range(generator.randint(0, 3)):
        text = generator.choice([text for text in TEXTS if CLOSE not in text])
        written, wanted = block(generator)
        whole += text + written
        content += text if text.strip() else ""
        calls += wanted
    last = generator.choice(TEXTS)
    if not last.isspace() or not calls:
        content += last
    return whole + last, content, calls


def mutated(generator: random.Random, text: str) -> str:
    for _ in range(generator.randint(1, 3)):
        place, kind = generator.randint(0, len(text)), generator.random()
        if kind < 0.35:
            text = text[:place] + generator.choice(SPLICES) + text[place:]
        elif kind < 0.7:
            text = text[:place] + text[place + generator.randint(1, 12) :]
        else:
            text = text[:place]
    return text


def pieces(generator: random.Random, text: str) -> list[str]:
    cuts = sorted(generator.choices(range(len(text) + 1), k=generator.choice((0, 1, 3, 10, len(text)))))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def parsed(parts: Sequence[str], *, inside: bool, cut: bool, thinks: bool) -> Found:
    """What is thought, the content, the calls with their arguments, and how many were complete."""
    reasoning = ReasoningParser(inside=False) if thinks else None
    parser = ToolCallParser(inside=inside)
    thought = content = ""
    calls: list[list[str]] = []
    events: list[Event] = []
    ends: list[str | None] = [*parts, None]
    for part in ends:
        more, text = ("", part or "")
        if reasoning is not None:
            more, text = reasoning.push(part) if part is not None else reasoning.flush()
        thought += more
        events += parser.push(text)
    events += parser.flush(cut=cut)
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallBegins):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        else:
            assert isinstance(event, CallArguments)
            calls[event.index][1] += event.text
    return thought, content, calls, parser.complete


@pytest.mark.parametrize("seed", every(4, range(4)))
def test_streams_say_what_whole_answers_say(seed: int) -> None:
    generator = random.Random(seed)
    for number in range(OUTPUTS // 4):
        text, content, calls = output(generator)
        thinks = number % 5 == 0
        if thinks:
            text = f"<think>\nHm, <tool_call>?{generator.choice(TEXTS)}\n</think>\n\n{text}"
        garbled = number % 2 == 1
        if garbled:
            text = mutated(generator, text)
        options = {"inside": number % 7 == 0, "cut": number % 3 == 0, "thinks": thinks}
        whole = parsed([text], **options)
        assert parsed(pieces(generator, text), **options) == whole, text
        if number % 4 == 0:
            assert parsed(list(text), **options) == whole, text
        if not garbled and not options["inside"] and not options["cut"]:
            found = [(name, json.loads(arguments)) for name, arguments in whole[2]]
            assert found == [(name, json.loads(arguments)) for name, arguments in calls], text
            assert whole[1] == (content.lstrip() if thinks else content), text
        if options["cut"] and not garbled:
            assert not whole[1].endswith("<tool_"), text


@pytest.mark.parametrize("limit", range(0, 90))
def test_no_markup_is_left_where_a_limit_cuts_a_call(limit: int) -> None:
    text = 'Sure.<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>'[:limit]
    content = parsed(list(text), inside=False, cut=True, thinks=False)[1]
    assert content in ("Sure."[:limit], "Sure.<", "Sure.<t", "Sure.<to", "Sure.<too", "Sure.<tool")


def test_a_mention_holds_nothing_back() -> None:
    for beginning in (
        "The <tool_call> tag. ",
        "<tool_call>{x ",
        '<tool_call>{"a": 1} ',
        "<tool_call> [1] ",
        '<tool_call>{"name": 5 ',
    ):
        parser = ToolCallParser()
        parser.push(beginning)
        for _ in range(50):
            assert parser.push("word ") == [Content("word ")], beginning

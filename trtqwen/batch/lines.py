"""Input files of a batch (a JSON list of prompts, JSONL, or OpenAI's batch format) and their results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import InputError, why_unreadable

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Line:
    """One request of a batch.

    Attributes:
        index: its place in the file, from 0.
        custom_id: of OpenAI's format; None in others.
        url: the route that answers it.
        body: of the request.
        error: why it cannot be answered; None if it can.
    """

    index: int
    url: str = COMPLETIONS
    body: Mapping[str, Any] = field(default_factory=dict)
    custom_id: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Defaults:
    """Defaults for fields that a request does not set.

    Attributes:
        chat: a prompt is a user's message.
        fields: of the body, such as `max_tokens`.
    """

    chat: bool
    fields: Mapping[str, Any]


def read_lines(path: Path, defaults: Defaults) -> list[Line]:
    """Read a file. A bad line becomes a line with an error.

    Raises:
        InputError: if the file cannot be read, or holds no request.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(
            f"{path}: cannot be read ({why_unreadable(problem)})", "name a UTF-8 file of requests"
        ) from None
    lines = [_line(index, entry, defaults) for index, entry in enumerate(_entries(path, text))]
    if not lines:
        raise InputError(f"{path}: holds no request", "give a JSON list of prompts or JSONL")
    return lines


def _entries(path: Path, text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        try:
            content = json.loads(text)
        except ValueError as problem:
            raise InputError(f"{path}: is not JSON ({problem})", "correct the file") from None
        yield from content
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as problem:
                yield InputError(f"line {number} is not JSON ({problem})")


def _line(index: int, entry: Any, defaults: Defaults) -> Line:
    if isinstance(entry, InputError):
        return Line(index, error=entry.what)
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        return Line(index, error="is neither a text nor a JSON object")
    if "custom_id" in entry and "body" in entry:
        return _openai_line(index, entry, defaults)
    body = {**defaults.fields, **entry}
    if "token_ids" in body:
        body["prompt"] = body.pop("token_ids")
    if "messages" in body:
        return Line(index, CHAT, body)
    if "prompt" not in body:
        return Line(index, error="has no prompt, token_ids or messages")
    if defaults.chat and isinstance(body["prompt"], str):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        return Line(index, CHAT, body)
    return Line(index, COMPLETIONS, body)


def _openai_line(index: int, entry: dict[str, Any], defaults: Defaults) -> Line:
    custom_id, url, body = str(entry["custom_id"]), entry.get("url"), entry["body"]
    if entry.get("method", "POST") != "POST" or url not in (CHAT, COMPLETIONS):
        return Line(index, custom_id=custom_id, error=f"url {url!r} is not served; use {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        return Line(index, url, custom_id=custom_id, error="body is not a JSON object")
    return Line(index, url, {**defaults.fields, **body}, custom_id)


def result(line: Line, status: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the output object of a line, in OpenAI's batch format if the line has that format.

    Args:
        status: of the answer by HTTP; 0 if there was no request.
    """
    if line.custom_id is not None:
        response = {"status_code": status, "request_id": answer.get("id", ""), "body": answer} if status else None
        error = None if status else {"code": "invalid_line", "message": line.error}
        return {"id": f"batch_req_{line.index}", "custom_id": line.custom_id, "response": response, "error": error}
    if status != 200:
        problem = answer.get("error") or {}
        message = line.error or problem.get("message", f"status {status}")
        return {"index": line.index, "error": {"message": message, "param": problem.get("param")}}
    choices = [
        {
            "text": choice["message"]["content"] if "message" in choice else choice["text"],
            "finish_reason": choice["finish_reason"],
            **({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {}),
        }
        for choice in answer["choices"]
    ]
    calls = [choice["message"].get("tool_calls") for choice in answer["choices"] if "message" in choice]
    for choice, tool_calls in zip(choices, calls, strict=False):
        if tool_calls:
            choice["tool_calls"] = tool_calls
    usage = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    first, *others = choices
    return {"index": line.index, **first, **({"choices": choices} if others else {}), "usage": usage}

"""From pieces of answers to OpenAI's `chat.completion` and its chunks; both are made from the same steps."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from trtqwen.gateway.api.chat import ChatPlan
from trtqwen.gateway.api.envelope import Envelope
from trtqwen.gateway.api.sse import DONE
from trtqwen.gateway.api.tools import CallArguments, CallBegins, Content, Event, ToolCallParser
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.generator import Finish, Generator, Piece, TokenLogProb, Usage


@dataclass(frozen=True)
class _Step:
    """What one piece adds to one choice."""

    index: int
    events: Sequence[Event]
    log_probs: Sequence[TokenLogProb]
    finish: Finish | None


class ChatAnswers:
    """The answers of one request."""

    def __init__(self, plan: ChatPlan, generator: Generator) -> None:
        self._plan = plan
        self._generator = generator
        self._usage = Usage()
        self._envelope = Envelope(
            generator.model, plan.generation, "chat.completion", "chat.completion.chunk", plan.include_usage
        )

    async def whole(self) -> dict[str, Any]:
        """The `chat.completion` object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        choices = [_Collected() for _ in self._plan.generation.prompts]
        async with aclosing(self._steps()) as steps:
            async for step in steps:
                choices[step.index].add(step)
        log_probs = self._plan.generation.sampling.log_probs
        objects = [choice.object(index, log_probs) for index, choice in enumerate(choices)]
        return self._envelope.whole(objects, self._usage)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events with `chat.completion.chunk` objects.

        Raises:
            ApiError: if the request is refused or fails.
        """
        frame, begun = self._envelope.frame, set()
        async with aclosing(self._steps()) as steps:
            async for step in steps:
                if step.index not in begun:
                    begun.add(step.index)
                    yield frame(step.index, '"delta":{"role":"assistant","content":""},"logprobs":null', first=True)
                log_probs = json.dumps(_log_probs(step.log_probs)) if step.log_probs else "null"
                deltas = [_delta(event) for event in step.events]
                if step.log_probs and not deltas:
                    deltas = ["{}"]
                for delta in deltas:
                    yield frame(step.index, f'"delta":{delta},"logprobs":{log_probs}')
                    log_probs = "null"
                if step.finish is not None:
                    yield frame(step.index, '"delta":{},"logprobs":null', step.finish)
        if self._plan.include_usage:
            yield self._envelope.usage_frame(self._usage)
        yield DONE

    async def _steps(self) -> AsyncGenerator[_Step, None]:
        choices = [_Choice(self._plan, self._generator) for _ in self._plan.generation.prompts]
        async with aclosing(self._generator.run(self._plan.generation, self._usage)) as pieces:
            async for piece in pieces:
                choice = choices[piece.index]
                if choice.finish is None:
                    events = choice.take(piece)
                    yield _Step(piece.index, events, piece.log_probs, choice.finish)
                    if choice.finish is not None and all(other.finish for other in choices):
                        break


class _Choice:
    """Takes one answer apart into content and calls, and decides why it ended."""

    def __init__(self, plan: ChatPlan, generator: Generator) -> None:
        self._parser = ToolCallParser(inside=plan.forced_call) if plan.parse_calls else None
        self._one_call = plan.one_call
        self._guide = plan.generation.sampling.guide
        self._metrics = generator.metrics
        self._guided: list[str] = []
        self.finish: Finish | None = None

    def take(self, piece: Piece) -> list[Event]:
        if self._guide is not None:
            self._guided.append(piece.text)
        self.finish = piece.finish
        events: list[Event] = [Content(piece.text)] if piece.text else []
        if self._parser is not None:
            events = self._parser.push(piece.text)
            if piece.finish is not None:
                events += self._parser.flush()
            if self._one_call and self._parser.complete:
                events = _first_call(events)
                self.finish = "tool_calls"
            elif piece.finish == "stop" and 0 < self._parser.calls == self._parser.complete:
                self.finish = "tool_calls"
        if piece.finish == "stop" and piece.matched is None:
            self._check()
        if self.finish is not None:
            self._metrics.finished.labels(self.finish).inc()
        return events

    def _check(self) -> None:
        if self._guide is not None and not self._guide.allows("".join(self._guided)):
            self._metrics.guided_violations.inc()
            message = "the engine's answer breaks the JSON schema it was held to; report this"
            raise ApiError(500, message, "guided_decoding_violation")


class _Collected:
    """One choice of an unstreamed answer."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._log_probs: list[TokenLogProb] = []
        self._finish: Finish | None = None

    def add(self, step: _Step) -> None:
        for event in step.events:
            if isinstance(event, Content):
                self._content.append(event.text)
            elif isinstance(event, CallBegins):
                function = {"name": event.name, "arguments": ""}
                self._calls.append({"id": event.id, "type": "function", "function": function})
            else:
                self._calls[event.index]["function"]["arguments"] += event.text
        self._log_probs += step.log_probs
        self._finish = step.finish

    def object(self, index: int, log_probs: bool) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        return {
            "index": index,
            "message": message,
            "logprobs": _log_probs(self._log_probs) if log_probs else None,
            "finish_reason": self._finish,
        }


def _first_call(events: Sequence[Event]) -> list[Event]:
    """Events up to the end of the first call."""
    own = [number for number, event in enumerate(events) if not isinstance(event, Content) and event.index == 0]
    return list(events[: own[-1] + 1]) if own else []


def _delta(event: Event) -> str:
    if isinstance(event, Content):
        return f'{{"content":{quoted(event.text)}}}'
    if isinstance(event, CallArguments):
        return f'{{"tool_calls":[{{"index":{event.index},"function":{{"arguments":{quoted(event.text)}}}}}]}}'
    function = {"name": event.name, "arguments": ""}
    call = {"index": event.index, "id": event.id, "type": "function", "function": function}
    return json.dumps({"tool_calls": [call]})


def _log_probs(entries: Sequence[TokenLogProb]) -> dict[str, Any]:
    content = [
        {
            "token": entry.text.decode(errors="replace"),
            "bytes": list(entry.text),
            "logprob": entry.log_prob,
            "top_logprobs": [],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}

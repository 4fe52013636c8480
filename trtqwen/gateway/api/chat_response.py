"""From pieces of answers to OpenAI's `chat.completion` and its chunks; both are made from the same steps."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, NamedTuple

from trtqwen.gateway.api.chat import ChatPlan
from trtqwen.gateway.api.envelope import OpenAiAnswers, stop_reason
from trtqwen.gateway.api.log_probs import chat_log_probs, prompt_log_probs
from trtqwen.gateway.api.reasoning import Reasoning, ReasoningParser
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.plan import Finish, Piece, TokenLogProb, Usage
from trtqwen.gateway.tools import CallArguments, CallBegins, Content, ToolCallParser
from trtqwen.gateway.tools import Event as AnswerEvent

Event = AnswerEvent | Reasoning


class Step(NamedTuple):
    """The changes of one choice by one piece.

    Attributes:
        number: of the choice.
        matched: the stop string or stop token that ended it.
        prompt: the prompt's tokens, if asked for.
    """

    number: int
    events: Sequence[Event]
    log_probs: Sequence[TokenLogProb]
    finish: Finish | None
    matched: str | int | None = None
    prompt: Sequence[TokenLogProb] = ()


async def chat_steps(plan: ChatPlan, generator: AnswerGenerator, usage: Usage) -> AsyncGenerator[Step, None]:
    """Yield the steps of a chat's answers, with text, reasoning and calls separated.

    Raises:
        ApiError: if the request is refused or fails.
    """
    choices = [_Choice(plan, generator) for _ in plan.generation.prompts]
    async with aclosing(generator.run(plan.generation, usage)) as pieces:
        async for piece in pieces:
            choice = choices[piece.number]
            if choice.finish is None:
                events = choice.take(piece)
                yield Step(piece.number, events, piece.log_probs, choice.finish, piece.matched, piece.prompt)
                if choice.finish is not None and all(other.finish for other in choices):
                    break


class ChatAnswers(OpenAiAnswers[ChatPlan]):
    """The answers of one request."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    async def whole(self) -> dict[str, Any]:
        """The `chat.completion` object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        choices = [CollectedChoice(self._plan.echo) for _ in self._plan.generation.prompts]
        prompt: Sequence[TokenLogProb] = ()
        async with aclosing(chat_steps(self._plan, self._generator, self.usage)) as steps:
            async for step in steps:
                choices[step.number].add(step)
                prompt = step.prompt or prompt
        sampling = self._plan.generation.sampling
        objects = [
            choice.object(index, chat_log_probs(choice.log_probs, self._token_bytes) if sampling.log_probs else None)
            for index, choice in enumerate(choices)
        ]
        asked = sampling.prompt_log_probs is not None
        return self._envelope.whole(
            objects, **({"prompt_logprobs": prompt_log_probs(prompt, self._token_bytes)} if asked else {})
        )

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events with `chat.completion.chunk` objects.

        Raises:
            ApiError: if the request is refused or fails.
        """
        frame, begun = self._envelope.frame, set()
        async with aclosing(chat_steps(self._plan, self._generator, self.usage)) as steps:
            async for step in steps:
                frames = []
                if step.number not in begun:
                    begun.add(step.number)
                    body = '"delta":{"role":"assistant","content":""},"logprobs":null'
                    frames.append(frame(step.number, body, first=True))
                    if self._plan.echo:
                        frames.append(
                            frame(step.number, f'"delta":{delta_of(Content(self._plan.echo))},"logprobs":null')
                        )
                log_probs = "null"
                if step.log_probs:
                    log_probs = json.dumps(chat_log_probs(step.log_probs, self._token_bytes))
                deltas = [delta_of(event) for event in step.events]
                if step.log_probs and not deltas:
                    deltas = ["{}"]
                for delta in deltas:
                    frames.append(frame(step.number, f'"delta":{delta},"logprobs":{log_probs}'))
                    log_probs = "null"
                if step.finish is not None:
                    body = f'"delta":{{}},"logprobs":null{stop_reason(step.matched)}'
                    frames.append(frame(step.number, body, step.finish))
                if frames:
                    yield b"".join(frames)
        for last in self._last_frames():
            yield last


class _Choice:
    """Separates one answer into content and calls, and finds its finish reason."""

    def __init__(self, plan: ChatPlan, generator: AnswerGenerator) -> None:
        self._plan = plan
        self._reasoning = None if plan.reasoning is None else ReasoningParser(inside=plan.reasoning == "inside")
        self._parser = ToolCallParser(inside=plan.forced_call) if plan.parse_calls else None
        self._guide = plan.generation.sampling.guide
        self._metrics = generator.metrics
        self._guided: list[str] = []
        self.finish: Finish | None = None

    def take(self, piece: Piece) -> list[Event]:
        if self._guide is not None:
            self._guided.append(piece.text)
        self.finish = piece.finish
        if self._reasoning is None:
            events = self._answer(piece.text, piece)
        else:
            thought, text = self._reasoning.push(piece.text)
            if piece.finish is not None:
                last = self._reasoning.flush()
                thought, text = thought + last[0], text + last[1]
            events = [Reasoning(thought)] if thought and self._plan.show_reasoning else []
            events += self._answer(text, piece)
        if piece.finish == "stop" and piece.matched is None:
            self._check()
        if self.finish is not None:
            self._metrics.finished.labels(self.finish).inc()
        return events

    def _answer(self, text: str, piece: Piece) -> list[Event]:
        """Parse the answer's text into content and calls."""
        parser = self._parser
        if parser is None:
            return [Content(text)] if text else []
        events: list[Event] = [*parser.push(text)]
        if piece.finish is not None:
            events += parser.flush(cut=piece.finish == "length" or piece.matched is not None)
        if self._plan.one_call and parser.complete:
            events = _first_call(events)
            self.finish = "stop" if self._plan.named_call else "tool_calls"
        elif piece.finish == "stop" and 0 < parser.calls == parser.complete:
            self.finish = "tool_calls"
        return events

    def _check(self) -> None:
        called = self._parser is not None and self._parser.calls and not self._plan.forced_call
        if self._guide is not None and not called and not self._guide.allows("".join(self._guided)):
            self._metrics.guided_violations.inc()
            message = "the engine's answer breaks the JSON schema it was held to; report this"
            raise ApiError(500, message, "guided_decoding_violation")


class CollectedChoice:
    """One choice of an unstreamed answer.

    Args:
        content: text in front of the answer.

    Attributes:
        calls: as `tool_calls` of a message has them.
        thought: the reasoning.
    """

    def __init__(self, content: str = "") -> None:
        self._content = [content] if content else []
        self._thought: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.log_probs: list[TokenLogProb] = []
        self.finish: Finish | None = None
        self._matched: str | int | None = None

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def thought(self) -> str:
        return "".join(self._thought)

    def add(self, step: Step) -> None:
        for event in step.events:
            if isinstance(event, Content):
                self._content.append(event.text)
            elif isinstance(event, Reasoning):
                self._thought.append(event.text)
            elif isinstance(event, CallBegins):
                function = {"name": event.name, "arguments": ""}
                self.calls.append({"id": event.id, "type": "function", "function": function})
            else:
                self.calls[event.index]["function"]["arguments"] += event.text
        self.log_probs += step.log_probs
        self.finish, self._matched = step.finish, step.matched

    def object(self, index: int, log_probs: dict[str, Any] | None) -> dict[str, Any]:
        """The choice of a `chat.completion`."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        if self._thought:
            message |= {"reasoning_content": self.thought, "reasoning": self.thought}  # older and newer name at vLLM
        choice = {"index": index, "message": message, "logprobs": log_probs, "finish_reason": self.finish}
        return choice if self._matched is None else {**choice, "stop_reason": self._matched}


def _first_call(events: Sequence[Event]) -> list[Event]:
    """Events up to the end of the first call."""
    own = [
        number
        for number, event in enumerate(events)
        if isinstance(event, (CallBegins, CallArguments)) and event.index == 0
    ]
    return list(events[: own[-1] + 1]) if own else []


def delta_of(event: Event) -> str:
    """A chunk's `delta`, as JSON."""
    if isinstance(event, Content):
        return f'{{"content":{quoted(event.text)}}}'
    if isinstance(event, CallArguments):
        return f'{{"tool_calls":[{{"index":{event.index},"function":{{"arguments":{quoted(event.text)}}}}}]}}'
    if isinstance(event, Reasoning):
        return f'{{"reasoning_content":{quoted(event.text)},"reasoning":{quoted(event.text)}}}'
    function = {"name": event.name, "arguments": ""}
    call = {"index": event.index, "id": event.id, "type": "function", "function": function}
    return json.dumps({"tool_calls": [call]})

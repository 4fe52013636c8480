"""OpenAI's response objects: shared fields, usage, and frames of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from trtqwen.gateway.api.sse import DONE
from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.plan import Finish, GenerationPlan, Usage
from trtqwen.gateway.model import ServedModel


def choice_count(n: int | None, prompts: int, most: int) -> int:
    """Answers of each prompt.

    Raises:
        ApiError: if one request asks for too many.
    """
    choices = n or 1
    if choices * prompts > most:
        asked = f"n={choices} for {prompts} prompts" if prompts > 1 else f"n={choices}"
        raise bad_request(f"{asked} is too many; one request may have {most} answers", param="n")
    return choices


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the field `usage` of chats and completions."""
    details = None if usage.cached_tokens is None else {"cached_tokens": usage.cached_tokens}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": details,
    }


@dataclass
class Envelope:
    """The fields of a response object besides its choices.

    Args:
        kind: `object` of a whole answer.
        chunk_kind: `object` of a part of a stream.
        with_usage: the stream ends with the usage, and the chunks before say null.
        continuous: they say the usage so far instead.
    """

    model: ServedModel
    plan: GenerationPlan
    kind: str
    chunk_kind: str
    usage: Usage
    with_usage: bool = False
    continuous: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # A stream repeats all but the choice: one formatting per token instead of one JSON document.
        self._head = f"data: {json.dumps(self._fields(self.chunk_kind))[:-1]}"
        self._tail = ',"usage":null}\n\n' if self.with_usage else "}\n\n"

    def whole(self, choices: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """The object of an unstreamed answer."""
        own = {**self._fields(self.kind), "seed": self.plan.sampling.seed, **fields}
        return {**own, "choices": list(choices), "usage": usage_object(self.usage)}

    def frame(self, index: int, body: str, finish: Finish | None = None, *, first: bool = False) -> bytes:
        """An event with part of one choice.

        Args:
            body: the choice's own fields, as JSON without braces.
            first: also tells the seed.
        """
        seed = f',"seed":{self.plan.sampling.seed}' if first else ""
        reason = f'"{finish}"' if finish else "null"
        choice = f'{{"index":{index},{body},"finish_reason":{reason}}}'
        tail = f',"usage":{json.dumps(usage_object(self.usage))}}}\n\n' if self.continuous else self._tail
        return f'{self._head}{seed},"choices":[{choice}]{tail}'.encode()

    def usage_frame(self) -> bytes:
        """The event with the token counts."""
        return f'{self._head},"choices":[],"usage":{json.dumps(usage_object(self.usage))}}}\n\n'.encode()

    def _fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.plan.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }


class AnswersPlan(Protocol):
    """The common fields of the plans of chats and completions."""

    @property
    def generation(self) -> GenerationPlan: ...

    @property
    def include_usage(self) -> bool: ...

    @property
    def continuous_usage(self) -> bool: ...


Plan = TypeVar("Plan", bound=AnswersPlan)


class OpenAiAnswers(Generic[Plan]):
    """The base class of the answers of chats and completions: OpenAI's response objects.

    Attributes:
        kind: `object` of a whole answer.
        chunk_kind: `object` of a part of a stream.
    """

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, plan: Plan, generator: AnswerGenerator) -> None:
        self._plan = plan
        self._generator = generator
        self._token_bytes = generator.model.tokenizer.token_bytes
        self.usage = Usage()
        self._envelope = Envelope(
            generator.model,
            plan.generation,
            self.kind,
            self.chunk_kind,
            self.usage,
            plan.include_usage,
            plan.continuous_usage,
        )

    def _last_frames(self) -> Iterator[bytes]:
        """Return the last frames of a stream."""
        if self._plan.include_usage:
            yield self._envelope.usage_frame()
        yield DONE


def stop_reason(matched: str | int | None) -> str:
    """vLLM's `stop_reason` of a streamed choice, as JSON behind other fields: what ended the answer, if anything."""
    return "" if matched is None else f',"stop_reason":{json.dumps(matched)}'

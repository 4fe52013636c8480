"""OpenAI's objects around answers: the fields that all of them share, usage, and frames of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.generation.generator import Finish, GenerationPlan, Usage
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


def usage_object(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


@dataclass
class Envelope:
    """What stands around the choices.

    Args:
        kind: `object` of a whole answer.
        chunk_kind: `object` of a part of a stream.
        with_usage: the stream ends with the usage, and the chunks before say null.
    """

    model: ServedModel
    plan: GenerationPlan
    kind: str
    chunk_kind: str
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        usage = ',"usage":null' if self.with_usage else ""
        # A stream repeats all but the choice: one formatting a token instead of one JSON document.
        self._head = f"data: {json.dumps(self._fields(self.chunk_kind))[:-1]}"
        self._tail = f"{usage}}}\n\n"

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The object of an unstreamed answer."""
        fields = {**self._fields(self.kind), "seed": self.plan.sampling.seed}
        return {**fields, "choices": list(choices), "usage": usage_object(usage)}

    def frame(self, index: int, body: str, finish: Finish | None = None, *, first: bool = False) -> bytes:
        """An event with part of one choice.

        Args:
            body: the choice's own fields, as JSON without braces.
            first: also tells the seed.
        """
        seed = f',"seed":{self.plan.sampling.seed}' if first else ""
        reason = f'"{finish}"' if finish else "null"
        choice = f'{{"index":{index},{body},"finish_reason":{reason}}}'
        return f'{self._head}{seed},"choices":[{choice}]{self._tail}'.encode()

    def usage_frame(self, usage: Usage) -> bytes:
        """The event with the token counts."""
        return f'{self._head},"choices":[],"usage":{json.dumps(usage_object(usage))}}}\n\n'.encode()

    def _fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.plan.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

"""Requests and responses: what crosses between a client of the executor and its step loop."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingConfig(_Message):
    """How the next token is chosen. As in TensorRT-LLM, a request is greedy unless top_k or top_p is given.

    Attributes:
        top_k: sample from the k likeliest tokens; 0 is no limit, 1 is greedy.
        top_p: sample from the likeliest tokens that together reach this probability; 0 counts as not given.
        temperature: divides the logits.
        seed: of the request's own random numbers.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or answer.
        presence_penalty, frequency_penalty: subtracted for answer tokens, once, and once for each occurrence.
        min_tokens: end and stop ids count only after this many tokens.
    """

    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    min_tokens: Annotated[int, Field(ge=0)] = 0

    @property
    def greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0 or (self.top_k == 0 and self.top_p == 0)


class Request(_Message):
    """One generation request.

    Attributes:
        id: unique among the requests in flight.
        input_token_ids: the prompt.
        max_tokens: answer tokens at most; lowered to what max_seq_len leaves, as TensorRT-LLM does.
        end_id: this token ends the answer and is not part of it.
        stop_words: token sequences that end the answer and are part of it.
    """

    id: str
    input_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    max_tokens: Annotated[int, Field(gt=0)]
    end_id: int | None = None
    stop_words: tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...] = ()
    sampling: SamplingConfig = SamplingConfig()


class FinishReason(str, Enum):
    """Why a request ended; the names are TensorRT-LLM's."""

    END_ID = "end_id"
    STOP_WORDS = "stop_words"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Response(_Message):
    """New tokens of a request; the last response carries a finish reason.

    Attributes:
        token_ids: the tokens since the response before.
        error: what went wrong, if `finish_reason` is `ERROR`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


class IterationStats(_Message):
    """The executor's account of its steps, in requests, tokens and blocks.

    Attributes:
        iterations: steps taken since the start.
        context_tokens, generation_tokens: tokens computed in them.
        active, waiting: requests in the batch, and in front of it.
        max_active: most requests that ever shared a step.
        paused: how often a request lost its blocks to an older one.
        used_blocks, max_blocks: KV cache blocks.
    """

    iterations: int = 0
    context_tokens: int = 0
    generation_tokens: int = 0
    active: int = 0
    waiting: int = 0
    max_active: int = 0
    paused: int = 0
    used_blocks: int = 0
    max_blocks: int = 0

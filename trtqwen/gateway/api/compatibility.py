"""Which fields of which API are honored, accepted without effect, or refused: the compatibility table's content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trtqwen.gateway.api.fields import NoEffect, Refused
from trtqwen.gateway.api.messages_request import CountTokensRequest, MessagesRequest
from trtqwen.gateway.api.responses_request import ResponseRequest
from trtqwen.gateway.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    StreamOptions,
    StructuredOutputs,
    TokenizeRequest,
)

SCHEMAS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/generate and /generate_stream": GenerateRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "Object stream_options": StreamOptions,
    "Object structured_outputs": StructuredOutputs,
}
Support = Literal["honored", "no effect", "refused"]


def support(field: FieldInfo) -> tuple[Support, str]:
    """Return how a field is handled, and the reason if it has no effect or is refused."""
    for mark in field.metadata:
        if isinstance(mark, NoEffect):
            return "no effect", mark.why
        if isinstance(mark, Refused):
            neutral = ", ".join(f"`{value!r}`" for value in mark.neutral)
            return "refused", f"{mark.why}{f' (accepted: {neutral})' if neutral else ''}"
    return "honored", ""

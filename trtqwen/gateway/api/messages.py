"""`/v1/messages`: answers in the format of Anthropic's Messages API, whole or as events, and token counts."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from trtqwen.gateway.api.failures import Json
from trtqwen.gateway.api.items import Change, Item, ItemizedAnswer
from trtqwen.gateway.api.messages_request import CountTokensRequest, MessagesRequest, chat_of
from trtqwen.gateway.api.prompt import Conversation
from trtqwen.gateway.api.respond import Route, answer_id, plan_translated, respond, work_out
from trtqwen.gateway.api.select import runtime_of, select
from trtqwen.gateway.api.tool_choice import offered_tools
from trtqwen.gateway.errors import ApiError

router = APIRouter(route_class=Route)
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/v1/messages")
async def messages(request: Request, body: MessagesRequest) -> Response:
    """An answer to a conversation."""
    plan = await plan_translated(request, body, chat_of, answer_id(request, "msg_"))
    answer = MessageAnswer(plan, runtime_of(request).generator)
    return await respond(request, plan.generation, answer, stream=body.stream, failed=_failed)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """How many tokens a conversation has."""
    runtime = select(request, body)

    def count() -> int:
        chat = chat_of(body)
        told = offered_tools(chat).told
        continued = bool(chat.continue_final_message)
        conversation = Conversation(
            runtime.model, runtime.template, runtime.config, chat.messages, told, continue_final=continued
        )
        return len(conversation.ids())

    return Json({"input_tokens": await work_out(request, body, count)})


class MessageAnswer(ItemizedAnswer):
    """The answer of one request."""

    async def whole(self) -> dict[str, Any]:
        """The `message` object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        content = [_block(item) for item in await self.collect()]
        return {**self._message(), "content": content, **self._end(), "usage": self._usage()}

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events, by Anthropic's names.

        Raises:
            ApiError: if the request is refused or fails.
        """
        begun = False
        async with aclosing(self.changes()) as changes:
            async for change in changes:
                if not begun:
                    begun = True
                    yield _event("message_start", message={**self._message(), "usage": self._usage()})
                    yield _event("ping")
                if change is not None:
                    yield _change(change)
        yield _event("message_delta", delta=self._end(), usage=self._usage())
        yield _event("message_stop")

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.plan.generation.request_id,
            "type": "message",
            "role": "assistant",
            "model": self.generator.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _end(self) -> dict[str, Any]:
        matched = None if self.last is None else self.last.matched
        if isinstance(matched, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": matched}
        finish = (self.last and self.last.finish) or "stop"
        called = finish == "stop" and any(item.kind == "call" for item in self.items.all)
        return {"stop_reason": "tool_use" if called else _REASONS[finish], "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        cached = self.usage.cached_tokens or 0
        return {
            "input_tokens": self.usage.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.usage.output_tokens,
        }


def _block(item: Item) -> dict[str, Any]:
    if item.kind == "text":
        return {"type": "text", "text": item.text, "citations": None}
    if item.kind == "thought":
        return {"type": "thinking", "thinking": item.text, "signature": ""}
    try:
        arguments = json.loads(item.text)
    except (ValueError, RecursionError):
        arguments = None  # a limit cut them, and the stop reason says so
    return {
        "type": "tool_use",
        "id": item.call_id,
        "name": item.name,
        "input": arguments if isinstance(arguments, dict) else {},
    }


def _change(change: Change) -> bytes:
    item, index = change.item, change.item.index
    if change.what == "begins":
        empty = Item(item.kind, index, item.name, item.call_id)
        return _event("content_block_start", index=index, content_block=_block(empty))
    if change.what == "ends":
        return _event("content_block_stop", index=index)
    kind, field = {
        "text": ("text_delta", "text"),
        "thought": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[item.kind]
    return _event("content_block_delta", index=index, delta={"type": kind, field: change.piece})


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def _failed(error: ApiError) -> bytes:
    return f"event: error\ndata: {json.dumps({**error.body, 'type': 'error'})}\n\n".encode()

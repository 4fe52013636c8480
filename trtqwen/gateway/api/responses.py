"""`/v1/responses`: answers in the format of OpenAI's Responses API, whole or as events. Responses are not stored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from trtqwen.gateway.api.chat import ChatPlan
from trtqwen.gateway.api.items import Change, Item, ItemizedAnswer
from trtqwen.gateway.api.log_probs import chat_log_probs
from trtqwen.gateway.api.respond import Route, answer_id, plan_translated, respond
from trtqwen.gateway.api.responses_request import ResponseRequest, chat_of
from trtqwen.gateway.api.responses_tools import ResponseTool, custom_input, response_tools
from trtqwen.gateway.api.select import runtime_of
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.plan import Finish, TokenLogProb

router = APIRouter(route_class=Route)


@router.post("/v1/responses")
async def responses(request: Request, body: ResponseRequest) -> Response:
    """An answer to a conversation that comes with the request."""
    plan = await plan_translated(request, body, chat_of, answer_id(request, "resp_"))
    answers = ResponseAnswers(body, plan, runtime_of(request).generator)
    failed = partial(_failed, answers)
    return await respond(request, plan.generation, answers, stream=body.stream, failed=failed)


class ResponseAnswers(ItemizedAnswer):
    """The answer of one request."""

    def __init__(self, request: ResponseRequest, plan: ChatPlan, generator: AnswerGenerator) -> None:
        super().__init__(plan, generator)
        self._request = request
        self._token_bytes = generator.model.tokenizer.token_bytes
        self._tools = response_tools(request.tools or ())
        self._created = int(time.time())
        self._ids: dict[int, str] = {}
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        """The `response` object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        await self.collect()
        return self._response(self._finish)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events, by OpenAI's names.

        Raises:
            ApiError: if the request is refused or fails.
        """
        begun = False
        async with aclosing(self.changes()) as changes:
            async for change in changes:
                if not begun:
                    begun = True
                    yield self.event("response.created", response=self._response(None))
                    yield self.event("response.in_progress", response=self._response(None))
                if change is not None:
                    for frame in self._change(change):
                        yield frame
        kind = "response.incomplete" if self._finish == "length" else "response.completed"
        yield self.event(kind, response=self._response(self._finish))

    @property
    def _finish(self) -> Finish:
        """Why the answer ended."""
        return (self.last and self.last.finish) or "stop"

    def event(self, kind: str, **fields: Any) -> bytes:
        """The next event."""
        content = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()

    def failed_response(self, error: ApiError) -> dict[str, Any]:
        """The response object of an answer that failed midway."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {"code": code, "message": error.message}
        return {**self._response(None), "status": "failed", "error": failure}

    def _change(self, change: Change) -> list[bytes]:
        """The events of a change."""
        item, what = change.item, change.what
        place: dict[str, Any] = {"output_index": item.index, "item_id": self._id(item)}
        part = {**place, "content_index": 0}
        if what == "begins":
            frames = [self.event("response.output_item.added", output_index=item.index, item=self._item(item, False))]
            if item.kind == "text":
                empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                frames.append(self.event("response.content_part.added", **part, part=empty))
            return frames
        if item.kind == "text":
            return self._text_events(change, part)
        if item.kind == "call":
            return self._call_events(change, place)
        if what == "grows":
            return [self.event("response.reasoning_text.delta", **part, delta=change.piece)]
        return [self.event("response.reasoning_text.done", **part, text=item.text), self._item_done(item)]

    def _call_events(self, change: Change, place: Mapping[str, Any]) -> list[bytes]:
        """The events of a call that grows or ends; a custom tool's text comes in one piece."""
        item, tool = change.item, self._tool(change.item)
        if not tool.custom:
            kind = "response.function_call_arguments"
            if change.what == "grows":
                return [self.event(f"{kind}.delta", **place, delta=change.piece)]
            return [self.event(f"{kind}.done", **place, arguments=item.text, name=tool.name), self._item_done(item)]
        if change.what == "grows":
            return []
        kind, text = "response.custom_tool_call_input", custom_input(item.text)
        return [
            self.event(f"{kind}.delta", **place, delta=text),
            self.event(f"{kind}.done", **place, input=text),
            self._item_done(item),
        ]

    def _tool(self, item: Item) -> ResponseTool:
        """Return the tool of a call; an unknown tool counts as a function."""
        return self._tools.get(item.name) or ResponseTool(item.name, None, custom=False, fields={})

    def _text_events(self, change: Change, part: Mapping[str, Any]) -> list[bytes]:
        item = change.item
        if change.what == "grows":
            log_probs = self._log_probs(change.log_probs)
            return [self.event("response.output_text.delta", **part, delta=change.piece, logprobs=log_probs)]
        text = self._text_part(item)
        return [
            self.event("response.output_text.done", **part, text=item.text, logprobs=text["logprobs"]),
            self.event("response.content_part.done", **part, part=text),
            self._item_done(item),
        ]

    def _item_done(self, item: Item) -> bytes:
        return self.event("response.output_item.done", output_index=item.index, item=self._item(item, True))

    def _text_part(self, item: Item) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": item.text,
            "annotations": [],
            "logprobs": self._log_probs(item.log_probs),
        }

    def _log_probs(self, entries: Sequence[TokenLogProb]) -> list[dict[str, Any]]:
        if not self._request.wants_log_probs:
            return []
        content: list[dict[str, Any]] = chat_log_probs(entries, self._token_bytes)["content"]
        return content

    def _id(self, item: Item) -> str:
        custom = item.kind == "call" and self._tool(item).custom
        prefix = "ctc" if custom else {"thought": "rs", "text": "msg", "call": "fc"}[item.kind]
        return self._ids.setdefault(item.index, f"{prefix}_{uuid.uuid4().hex}")

    def _item(self, item: Item, complete: bool, status: str = "completed") -> dict[str, Any]:
        fields: dict[str, Any] = {"id": self._id(item), "status": status if complete else "in_progress"}
        if item.kind == "thought":
            content = [{"type": "reasoning_text", "text": item.text}] if complete else []
            return {**fields, "type": "reasoning", "summary": [], "content": content}
        if item.kind == "text":
            content = [self._text_part(item)] if complete else []
            return {**fields, "type": "message", "role": "assistant", "content": content}
        tool = self._tool(item)
        call = {"call_id": item.call_id, "name": tool.name}
        if tool.namespace is not None:
            call["namespace"] = tool.namespace
        text = item.text if complete else ""
        if tool.custom:
            return {**fields, "type": "custom_tool_call", **call, "input": custom_input(text)}
        return {**fields, "type": "function_call", **call, "arguments": text}

    def _response(self, finish: Finish | None) -> dict[str, Any]:
        """The response object; without a finish, of an answer that goes on."""
        request, cut = self._request, finish == "length"
        status = "in_progress" if finish is None else "incomplete" if cut else "completed"
        items = self.items.all if finish is not None else []
        output = [
            self._item(item, True, "incomplete" if cut and item is items[-1] else "completed") for item in items
        ]
        settings = request.text.model_dump(exclude_none=True, by_alias=True) if request.text else {}
        return {
            "id": self.plan.generation.request_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self.generator.model.name,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}, **settings},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "background": False,
            "metadata": request.metadata or {},
            "user": request.user,
            "usage": None if finish is None else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0, "cache_write_tokens": 0},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
        }


def _failed(answers: ResponseAnswers, error: ApiError) -> bytes:
    return answers.event("response.failed", response=answers.failed_response(error))

"""Common code of all routes that generate tokens: plan the request, and answer it whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from trtqwen.gateway.admission.auth import Caller
from trtqwen.gateway.admission.desk import LONG_BODY, Desk
from trtqwen.gateway.api.chat import ChatPlan, plan_chat
from trtqwen.gateway.api.failures import OUR_FAULT, Json, fleet_of
from trtqwen.gateway.api.fields import refuse_unknown, unknown_fields
from trtqwen.gateway.api.schemas import ChatRequest
from trtqwen.gateway.api.select import check_room, select
from trtqwen.gateway.api.sse import EventStream, frame, unless_gone
from trtqwen.gateway.chat_template import NeedsThread
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.plan import GenerationPlan, Usage

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
_log = logging.getLogger(__name__)
_IGNORED = "x-trtqwen-ignored"
_MOST_WARNINGS = 1000  # names of fields that the log has seen
_warned: set[str] = set()


class Answers(Protocol):
    """The answers of one request; one of the two is made once."""

    usage: Usage

    async def whole(self) -> dict[str, Any]: ...

    def frames(self) -> AsyncGenerator[bytes, None]: ...


class Route(APIRoute):
    """A route whose body is JSON in UTF-8, and says where it is not."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Utf8Request(request.scope, request.receive))

        return handle


class _Utf8Request(Request):
    async def json(self) -> Any:
        try:
            return await super().json()
        except UnicodeDecodeError as problem:
            raise json.JSONDecodeError(f"byte {problem.start} is not UTF-8", "", problem.start) from None
        except RecursionError:
            raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


async def work_out(request: HTTPConnection, body: BaseModel, plan: Callable[[], T]) -> T:
    """Plan a request if there is room. A long one runs in a thread, because its tokenization would block all streams.

    A long request holds a turn of the desk, which ends here.

    Raises:
        ApiError: if there is no room at the engine that `select` has chosen, or the plan refuses it.
    """
    turn: AsyncExitStack | None = getattr(request.state, "turn", None)
    try:
        note_unknown(request, body)
        check_room(request, getattr(body, "priority", None) or 0)
        if turn is not None:
            return await asyncio.to_thread(plan)
        try:
            return plan()
        except NeedsThread:
            desk: Desk = request.app.state.desk
            async with desk.bodies.turn(request.state.caller.name, LONG_BODY):
                return await asyncio.to_thread(plan)
    finally:
        if turn is not None:
            await turn.aclose()


async def plan_translated(
    request: Request, body: B, translate: Callable[[B], ChatRequest], request_id: str
) -> ChatPlan:
    """Plan a request of another API as a chat.

    Raises:
        ApiError: as `work_out` does.
    """
    runtime = select(request, body)

    def plan() -> ChatPlan:
        return plan_chat(runtime.model, runtime.template, runtime.config, translate(body), request_id=request_id)

    return await work_out(request, body, plan)


async def respond(
    request: Request,
    plan: GenerationPlan,
    answers: Answers,
    *,
    stream: bool | None,
    failed: Callable[[ApiError], bytes] = lambda error: frame(json.dumps(error.body)),
) -> Response:
    """Answer with one object or with events; errors before the first token have their own status either way.

    Args:
        failed: the event that ends a stream with an error.
    """
    caller: Caller = request.state.caller
    headers = {_IGNORED: request.state.ignored} if hasattr(request.state, "ignored") else {}
    request.state.usage = answers.usage
    caller.charge_tokens(plan.reserved_tokens, time.monotonic())
    try:
        if not stream:
            whole = await unless_gone(request.receive, answers.whole)
            settle(caller, plan, answers.usage)
            return Json(whole, headers=headers)
        frames = answers.frames()
        try:
            first = await unless_gone(request.receive, lambda: anext(frames))
        except BaseException:
            await frames.aclose()
            raise
    except ApiError as problem:
        if problem.status in (400, 429, 503):  # nothing was done for it
            caller.refund_tokens(plan.reserved_tokens)
        raise
    refused = fleet_of(request).metrics.refused

    def fail(problem: Exception) -> bytes:
        error = problem if isinstance(problem, ApiError) else OUR_FAULT
        if error is OUR_FAULT:
            _log.error("a stream failed", exc_info=problem)
        refused.labels(str(error.status), error.code).inc()
        return failed(error)

    def end(gone: bool) -> None:
        if gone:
            refused.labels("499", "client_gone").inc()
        settle(caller, plan, answers.usage)

    return EventStream(first, frames, fail, end, headers)


def settle(caller: Caller, plan: GenerationPlan, usage: Usage) -> None:
    """Charge tokens of answers without a limit beyond their reservation."""
    caller.take_tokens(max(0, usage.output_tokens - plan.reserved * len(plan.prompts)))


def answer_id(request: HTTPConnection, prefix: str) -> str:
    """A new id for an answer, which goes with it to the engine and into Triton's traces.

    It holds the client's `X-Request-Id`, if there is one that fits.
    """
    given = request.headers.get("x-request-id", "")
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given):
        return f"{prefix}{given}-{uuid.uuid4().hex[:12]}"
    return f"{prefix}{uuid.uuid4().hex}"


def note_unknown(request: HTTPConnection, body: BaseModel) -> None:
    """Apply the setting `unknown_fields`.

    Raises:
        ApiError: if they are refused.
    """
    names = unknown_fields(body)
    if not names:
        return
    setting = fleet_of(request).config.unknown_fields
    if setting == "refuse":
        refuse_unknown(body, names)
    if setting == "warn":
        request.state.ignored = ", ".join(quote(name, safe=".[]$:@") for name in names[:20])
        for name in names:
            if name not in _warned and len(_warned) < _MOST_WARNINGS:
                _warned.add(name)
                _log.warning("requests have the unknown field %r, which is ignored", name)

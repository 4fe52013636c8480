"""Chats and `/generate_stream` over a WebSocket: a text message with a request's body, one for each event back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial
from typing import Any, TypeVar

import anyio
from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, ValidationError
from starlette.websockets import WebSocketDisconnect

from trtqwen.gateway.admission.access_log import AccessLog
from trtqwen.gateway.admission.auth import Caller
from trtqwen.gateway.admission.desk import Desk, body_memory
from trtqwen.gateway.api.chat import plan_chat
from trtqwen.gateway.api.chat_response import ChatAnswers
from trtqwen.gateway.api.failures import OUR_FAULT, fleet_of
from trtqwen.gateway.api.generate import PlainAnswer, plan_plain
from trtqwen.gateway.api.respond import Answers, answer_id, settle, work_out
from trtqwen.gateway.api.schemas import ChatRequest, GenerateRequest
from trtqwen.gateway.api.select import release, select
from trtqwen.gateway.errors import ApiError, bad_request
from trtqwen.gateway.generation.plan import GenerationPlan
from trtqwen.gateway.state import Runtime

B = TypeVar("B", bound=BaseModel)
Plan = Callable[[Runtime, WebSocket, Any], tuple[GenerationPlan, Answers]]
_log = logging.getLogger(__name__)
_POLICY_VIOLATION = 1008
_UNREAD_SECONDS = 60.0  # a client that does not read for this time counts as disconnected

router = APIRouter()


@router.websocket("/v1/chat/completions")
async def chats(socket: WebSocket) -> None:
    """Chats, one after another."""
    await _serve(socket, ChatRequest, _plan_chat)


@router.websocket("/generate_stream")
async def generations(socket: WebSocket) -> None:
    """Plain text in, events out, one request after another."""
    await _serve(socket, GenerateRequest, _plan_plain)


def _plan_chat(runtime: Runtime, socket: WebSocket, body: ChatRequest) -> tuple[GenerationPlan, Answers]:
    name = answer_id(socket, "chatcmpl-")
    plan = plan_chat(runtime.model, runtime.template, runtime.config, body, request_id=name)
    return plan.generation, ChatAnswers(plan, runtime.generator)


def _plan_plain(runtime: Runtime, socket: WebSocket, body: GenerateRequest) -> tuple[GenerationPlan, Answers]:
    plan = plan_plain(runtime.model, runtime.config, body, request_id=answer_id(socket, "gen-"))
    return plan.generation, PlainAnswer(plan, runtime.generator)


async def _serve(socket: WebSocket, schema: type[B], plan: Plan) -> None:
    """Answer messages until the client disconnects. An error affects only its message."""
    origin = socket.headers.get("origin")
    config = fleet_of(socket).config
    if origin is not None and not config.allows_origin(origin, socket.headers.get("host", "")):
        # Browsers let any page open a WebSocket to any host: this is the only check.
        access_log: AccessLog = socket.state.access_log
        access_log.write(socket.scope, 403, 0.0, None)
        await socket.close(_POLICY_VIOLATION, "this origin is not among allowed_origins")
        return
    await socket.accept()
    receiving: asyncio.Task[str] = asyncio.ensure_future(socket.receive_text())
    try:
        while True:
            text = await receiving
            receiving = asyncio.ensure_future(socket.receive_text())
            answering = asyncio.ensure_future(_answer(socket, text, schema, plan))
            await asyncio.wait((answering, receiving), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done() and receiving.exception() is not None:
                answering.cancel()  # the client has disconnected: its answer ends
                await asyncio.gather(answering, return_exceptions=True)
                return
            await answering
    except (WebSocketDisconnect, RuntimeError, TimeoutError):
        return
    finally:
        receiving.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await receiving


async def _answer(socket: WebSocket, text: str, schema: type[B], plan: Plan) -> None:
    refused = fleet_of(socket).metrics.refused
    begun, status, usage = time.monotonic(), 200, None
    try:
        caller: Caller = socket.state.caller
        caller.charge_request(begun)
        desk: Desk = socket.app.state.desk
        async with AsyncExitStack() as stack:
            content = text.encode("utf-8", "surrogatepass")
            stack.enter_context(desk.share(caller.name)).grow(body_memory(content))
            socket.state.turn = turn = await stack.enter_async_context(AsyncExitStack())
            await turn.enter_async_context(desk.bodies.turn(caller.name, len(content)))
            body = _read(text, schema)
            runtime = select(socket, body)
            generation, answers = await work_out(socket, body, partial(plan, runtime, socket, body))
            caller.charge_tokens(generation.reserved_tokens, time.monotonic())
            usage = answers.usage
            try:
                await _send(socket, answers.frames())
            finally:
                settle(caller, generation, usage)
    except (WebSocketDisconnect, asyncio.CancelledError):
        status = 0
        refused.labels("499", "client_gone").inc()
        raise
    except Exception as problem:
        error = problem if isinstance(problem, ApiError) else OUR_FAULT
        status = error.status
        if error is OUR_FAULT:
            _log.error("an answer failed", exc_info=problem)
        refused.labels(str(status), error.code).inc()
        await socket.send_text(json.dumps(error.body))
    finally:
        release(socket.scope)
        access_log: AccessLog = socket.state.access_log
        access_log.write(socket.scope, status, time.monotonic() - begun, usage)


async def _send(socket: WebSocket, frames: AsyncGenerator[bytes, None]) -> None:
    async with aclosing(frames):
        async for several in frames:
            for event in several.decode().split("\n\n")[:-1]:
                # asyncio.wait_for loses a cancellation before Python 3.12, and with it that the client has
                # disconnected.
                with anyio.fail_after(_UNREAD_SECONDS):
                    await socket.send_text(event.removeprefix("data: "))


def _read(text: str, schema: type[B]) -> B:
    try:
        return schema.model_validate_json(text)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise bad_request(f"{place or 'the message'}: {message}", param=place or None) from None

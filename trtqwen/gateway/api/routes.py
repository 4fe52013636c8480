"""The routes: each parses, plans and answers; whatever goes wrong becomes an error in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from trtqwen.gateway.admission.auth import Caller
from trtqwen.gateway.api.chat import plan_chat
from trtqwen.gateway.api.chat_response import ChatAnswers
from trtqwen.gateway.api.completions import CompletionAnswers, plan_completion
from trtqwen.gateway.api.generate import PlainAnswer, plan_plain
from trtqwen.gateway.api.schemas import ChatRequest, CompletionRequest, GenerateRequest
from trtqwen.gateway.api.sse import EventStream, frame, unless_gone
from trtqwen.gateway.errors import ApiError, bad_request
from trtqwen.gateway.generation.generator import GenerationPlan
from trtqwen.gateway.state import Runtime

T = TypeVar("T")
router = APIRouter()
_log = logging.getLogger(__name__)
_LONG_BODY = 16 << 10  # bytes, tokenised in some milliseconds
_PAGE = Path(__file__).with_name("chat.html").read_bytes()
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)
_OUR_FAULT = ApiError(500, "the gateway failed on this request; its log says why", "internal_error")


class _Answers(Protocol):
    async def whole(self) -> dict[str, Any]: ...

    def frames(self) -> AsyncGenerator[bytes, None]: ...


class Json(JSONResponse):
    """JSON in ASCII: what clients sent may come back in an error, and lone surrogates have no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """A chat, by the model's own template."""
    runtime = _runtime(request)
    _check_model(runtime, body.model)
    plan = await _plan(request, partial(plan_chat, runtime.model, runtime.template, runtime.config, body))
    return await _respond(request, plan.generation, ChatAnswers(plan, runtime.generator), stream=body.stream)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """The continuation of prompts, taken as they are."""
    runtime = _runtime(request)
    _check_model(runtime, body.model)
    plan = await _plan(request, partial(plan_completion, runtime.model, runtime.config, body))
    return await _respond(request, plan.generation, CompletionAnswers(plan, runtime.generator), stream=body.stream)


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Plain text in and out."""
    return await _generate(request, body, stream=False)


@router.post("/generate_stream")
async def generate_stream(request: Request, body: GenerateRequest) -> Response:
    """Plain text in, events out."""
    return await _generate(request, body, stream=True)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def chat_page() -> Response:
    """The page for people."""
    return Response(_PAGE, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": _POLICY})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model."""
    return Json({"object": "list", "data": [_model(_runtime(request))]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """The one model, by its name."""
    runtime = _runtime(request)
    _check_model(runtime, name)
    return Json(_model(runtime))


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Response:
    """Whether this process lives."""
    return Json({"status": "alive"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether new requests are taken and the engine makes tokens."""
    runtime = _runtime(request)
    if runtime.gate.draining:
        return Json({"status": "stopping"}, 503)
    return Json({"status": "ready"}) if runtime.monitor.ready else Json({"status": "the engine does not answer"}, 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The gateway's metrics for Prometheus; the engine's are at Triton's own endpoint."""
    return Response(_runtime(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def on_api_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, ApiError)
    _runtime(request).metrics.refused.labels(str(problem.status), problem.code).inc()
    return Json(problem.body, problem.status, problem.headers)


async def on_invalid_request(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError)
    errors = problem.errors()
    # Of a field that may be several things, each is tried: what fits but for its value says more.
    first = next((error for error in errors if not error["type"].endswith("_type")), errors[0])
    field = _path(first, problem.body)
    if first["type"] == "extra_forbidden":
        error = bad_request(f"Unrecognized request argument supplied: {field}", param=field, code="unknown_field")
    elif isinstance(problem.body, bytes):  # FastAPI reads no other kind of body
        message = "the body is not declared as JSON; send the header Content-Type: application/json"
        error = ApiError(415, message, "unsupported_media_type")
    elif first["type"] == "json_invalid":
        error = bad_request(f"the body is not JSON ({first.get('ctx', {}).get('error', '')})", code="invalid_json")
    else:
        message = first["msg"].removeprefix("Value error, ")
        error = bad_request(f"{field or 'body'}: {message}", param=field or None)
    return await on_api_error(request, error)


async def on_http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    message = f"{request.method} {request.url.path}: {problem.detail}"
    return await on_api_error(request, ApiError(problem.status_code, message, "http_error"))


async def on_client_gone(request: Request, problem: Exception) -> Response:
    _runtime(request).metrics.refused.labels("499", "client_gone").inc()
    return Response(status_code=499)


async def on_failure(request: Request, problem: Exception) -> Response:
    return await on_api_error(request, _OUR_FAULT)  # the server logs what it was


def _path(error: Mapping[str, Any], body: Any) -> str:
    """The field that a validation error is about; its location also names the types that were tried."""
    path: list[str] = []
    for part in error["loc"][1:]:
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            path.append(str(part))
            body = body[part]
    return ".".join([*path, str(error["loc"][-1])] if error["type"] == "missing" else path)


async def _generate(request: Request, body: GenerateRequest, *, stream: bool) -> Response:
    runtime = _runtime(request)
    plan = await _plan(request, partial(plan_plain, runtime.model, runtime.config, body))
    answer = PlainAnswer(plan, runtime.generator)
    return await _respond(request, plan.generation, answer, stream=stream or bool(body.stream))


async def _plan(request: Request, plan: Callable[[], T]) -> T:
    """Work a request out, if it may come in; a long one in a thread: every stream would wait for its tokeniser."""
    _runtime(request).gate.check_room()
    length = request.headers.get("content-length", "")
    return plan() if length.isdigit() and int(length) < _LONG_BODY else await asyncio.to_thread(plan)


async def _respond(request: Request, plan: GenerationPlan, answers: _Answers, *, stream: bool | None) -> Response:
    """Answer with one object or with events; errors before the first token have their own status either way."""
    caller: Caller = request.state.caller
    tokens = sum(len(prompt) + plan.max_tokens for prompt in plan.prompts)
    caller.charge_tokens(tokens, time.monotonic())
    try:
        if not stream:
            return Json(await unless_gone(request.receive, answers.whole))
        frames = answers.frames()
        try:
            first = await unless_gone(request.receive, lambda: anext(frames))
        except BaseException:
            await frames.aclose()
            raise
    except ApiError as problem:
        if problem.status in (400, 429, 503):  # nothing was done for it
            caller.refund_tokens(tokens)
        raise
    return EventStream(_frames(request, first, frames))


async def _frames(request: Request, first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """All events; an error in mid-stream is the last one."""
    refused = _runtime(request).metrics.refused
    async with aclosing(rest):
        try:
            yield first
            async for event in rest:
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            refused.labels("499", "client_gone").inc()
            raise
        except Exception as problem:
            error = problem if isinstance(problem, ApiError) else _OUR_FAULT
            if error is _OUR_FAULT:
                _log.error("a stream failed", exc_info=problem)
            refused.labels(str(error.status), error.code).inc()
            yield frame(json.dumps(error.body))


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


def _check_model(runtime: Runtime, name: str) -> None:
    if name != runtime.model.name:
        message = f"the model {name!r} does not exist; this server has {runtime.model.name!r}"
        raise ApiError(404, message, "model_not_found", param="model")


def _model(runtime: Runtime) -> dict[str, Any]:
    model = runtime.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "trtqwen",
        "max_model_len": model.limits.max_seq_len,
    }

"""Errors of requests in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from trtqwen.gateway.api.sse import ClientGone
from trtqwen.gateway.errors import ApiError, bad_request
from trtqwen.gateway.fleet.fleet import Fleet

OUR_FAULT = ApiError(500, "the gateway failed on this request; its log says why", "internal_error")
_NOT_SERVED = {
    "/v1/embeddings": "this model answers in text; it makes no embeddings",
    "/v1/rerank": "this model answers in text; it does not rank documents",
    "/v1/score": "this model answers in text; it does not score texts",
    "/v1/audio": "this model reads and writes text alone",
    "/v1/images": "this model reads and writes text alone",
    "/v1/files": "nothing is kept here; send everything with the request",
    "/v1/batches": "send the requests one by one",
    "/v1/conversations": "nothing is kept here; send the whole conversation with each request",
    "/v1/responses/": "answers are not kept; send the whole conversation with each request",
}
_SERVED = "/v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /tokenize and /generate"


class Json(JSONResponse):
    """JSON in ASCII: what clients sent may come back in an error, and lone surrogates have no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def fleet_of(request: Any) -> Fleet:
    """The running gateway that a request, or a WebSocket, came to."""
    fleet: Fleet = request.app.state.fleet
    return fleet


def add_handlers(app: FastAPI) -> None:
    """Add handlers to an application, so that every failure has OpenAI's format."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(Exception, _on_failure)


def error_of(problem: RequestValidationError) -> ApiError:
    """Return the first mistake of a request's body as an error."""
    errors = problem.errors()
    # Of a field that may be several things, each is tried: what fits but for its value says more.
    first = next((error for error in errors if not error["type"].endswith("_type")), errors[0])
    field = _path(first, problem.body)
    if isinstance(problem.body, bytes):  # FastAPI reads no other kind of body
        message = "the body is not declared as JSON; send the header Content-Type: application/json"
        return ApiError(415, message, "unsupported_media_type")
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not JSON ({first.get('ctx', {}).get('error', '')})", code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{field or 'body'}: {message}", param=field or None)


async def _on_api_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, ApiError)
    fleet_of(request).metrics.refused.labels(str(problem.status), problem.code).inc()
    return Json(problem.body, problem.status, problem.headers)


async def _on_invalid_request(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError)
    return await _on_api_error(request, error_of(problem))


async def _on_http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    path = request.scope["path"]
    message = f"{request.method} {path}: {problem.detail}"
    if problem.status_code == 404:
        known = next((why for start, why in _NOT_SERVED.items() if f"{path}/".startswith(start)), None)
        message += f"; {known or f'the routes are {_SERVED}'}"
    error = ApiError(problem.status_code, message, "http_error")
    error.headers |= problem.headers or {}
    if problem.status_code == 405:
        error.headers["Allow"] = ", ".join(sorted(_allowed(request)))
    return await _on_api_error(request, error)


def _allowed(request: Request) -> set[str]:
    """The methods that a path takes: several routes may have it, of which Starlette names the first one's."""
    methods = {"OPTIONS"}
    for method in ("GET", "POST"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            methods.add(method)
    return methods | ({"HEAD"} if "GET" in methods else set())


async def _on_client_gone(request: Request, problem: Exception) -> Response:
    fleet_of(request).metrics.refused.labels("499", "client_gone").inc()
    return Response(status_code=499)


async def _on_failure(request: Request, problem: Exception) -> Response:
    return await _on_api_error(request, OUR_FAULT)  # the server logs what it was


def _path(error: Mapping[str, Any], body: Any) -> str:
    """The field that a validation error is about; its location also names the types that were tried."""
    path: list[str] = []
    for part in error["loc"][1:]:
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            path.append(str(part))
            body = body[part]
    return ".".join([*path, str(error["loc"][-1])] if error["type"] == "missing" else path)

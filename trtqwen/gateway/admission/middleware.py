"""In front of the routes: who is asking, how often, and how much may be sent. Refuses before anything is parsed."""

from __future__ import annotations

import asyncio
import json
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trtqwen.gateway.admission.auth import CALLER, Authenticator
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.metrics import Metrics

_PROTECTED = ("/v1/", "/generate", "/tokenize", "/detokenize", "/tokenizer_info")


class Guard:
    """ASGI middleware: API key, rate of requests, size and time of the body. `scope["state"]["caller"]` is who asked.

    Args:
        max_header_bytes, max_body_bytes: of a request.
        body_seconds: for the whole body.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        metrics: Metrics,
        *,
        max_header_bytes: int,
        max_body_bytes: int,
        body_seconds: float,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._metrics = metrics
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not scope["path"].startswith(_PROTECTED):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["type"] == "websocket":
            await self._open(scope, headers, receive, send)
            return
        try:
            self._check_size(scope)
            caller = self._authenticator.authenticate(_authorization(headers))
            if scope["method"] == "POST":
                caller.charge_request(time.monotonic())
            body = await asyncio.wait_for(self._body(headers, receive), self._body_seconds)
        except ApiError as problem:
            await self._refuse(problem, send)
            return
        except asyncio.TimeoutError:
            message = f"the request's body was not here within {self._body_seconds:g} s; send it faster"
            await self._refuse(ApiError(408, message, "body_timeout"), send)
            return
        if body is None:
            return
        scope.setdefault("state", {})["caller"] = caller
        CALLER.set(caller)
        pending = [body]

        async def replay() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    async def _open(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Let a WebSocket in by its key; its messages are charged one by one."""
        try:
            self._check_size(scope)
            caller = self._authenticator.authenticate(_authorization(headers))
        except ApiError as problem:
            self._metrics.refused.labels(str(problem.status), problem.code).inc()
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": problem.message[:100]})
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes:
            message = f"the request's headers have {size} bytes; {self._max_header_bytes} are allowed"
            raise ApiError(431, message, "headers_too_large")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone meanwhile."""
        too_large = ApiError(
            413, f"the request's body exceeds {self._max_body_bytes} bytes; send less", "body_too_large"
        )
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    async def _refuse(self, problem: ApiError, send: Send) -> None:
        self._metrics.refused.labels(str(problem.status), problem.code).inc()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]  # the body was not read
        headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(problem.body).encode()})


def _authorization(headers: dict[bytes, bytes]) -> str | None:
    """The `Authorization` header, or what `X-Api-Key`, the header of Anthropic's clients, amounts to."""
    if b"authorization" in headers:
        return headers[b"authorization"].decode("latin-1")
    return f"Bearer {headers[b'x-api-key'].decode('latin-1')}" if b"x-api-key" in headers else None

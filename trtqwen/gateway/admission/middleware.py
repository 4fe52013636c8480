"""Middleware in front of the routes: keys, rates and size limits. It refuses requests before they are parsed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from contextlib import AsyncExitStack

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trtqwen.gateway.admission.access_log import AccessLog
from trtqwen.gateway.admission.auth import CALLER, Authenticator, Caller, Guesses
from trtqwen.gateway.admission.desk import LONG_BODY, Desk, Share, body_memory
from trtqwen.gateway.connections import network_of
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.metrics import Metrics

_ADDRESS = re.compile(r"[0-9.]+")
_PORT = re.compile(r":[0-9]*$")
_METRICS = ("/metrics", "/openapi.json")
_HARMLESS = ("/health", "/ready")  # asked under any name by load balancers
_POLICY_VIOLATION, _TRY_AGAIN = 1008, 1013  # of a WebSocket
_ADMIN = "/admin/"
_PROTECTED = ("/v1/", "/generate", "/tokenize", "/detokenize", "/tokenizer_info")


class Guard:
    """ASGI middleware: API key, rate of requests, size and time of the body. Sets `scope["state"]["caller"]`.

    Args:
        max_header_bytes, max_body_bytes: of a request.
        allowed_hosts: names that the Host header may give; None allows all.
        desk: limits the memory of bodies and the parallel work on long ones.
        access_log: write a line for each request.
        protect_metrics: require a key for the metrics and the OpenAPI document too.
        admins: keys of the admin routes; None disables these routes.
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
        desk: Desk,
        allowed_hosts: Collection[str] | None = None,
        access_log: bool = False,
        protect_metrics: bool = False,
        admins: Authenticator | None = None,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._metrics = metrics
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._desk = desk
        self._allowed_hosts = allowed_hosts
        always = () if admins is None else (_ADMIN,)
        self._access_log = AccessLog(metrics, on=access_log, always=always)
        self._protected = (*_PROTECTED, *(_METRICS if protect_metrics else ()))
        self._admins = admins
        self._guesses = Guesses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._open(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        state = scope.setdefault("state", {})

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, noting)
        finally:
            self._access_log.write(scope, status, time.monotonic() - begun, state.get("usage"))

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if self._allowed_hosts is None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if _PORT.search(host) else host
        # An attacker's name has a dot: addresses and names of the local network belong to this network alone.
        if "." in name and not _ADDRESS.fullmatch(name) and name not in self._allowed_hosts:
            message = "the Host header names another server; add its name to allowed_hosts"
            raise ApiError(421, message, "unknown_host")

    def _is_admin(self, scope: Scope) -> bool:
        return self._admins is not None and scope["path"].startswith(_ADMIN)

    def _authenticate(self, scope: Scope, headers: dict[bytes, bytes]) -> Caller:
        admins = self._admins
        authenticator = admins if admins is not None and self._is_admin(scope) else self._authenticator
        try:
            return authenticator.authenticate(_authorization(headers))
        except ApiError as problem:
            if problem.code == "invalid_api_key":
                address = scope["client"][0] if scope.get("client") else ""
                self._guesses.wrong(network_of(address), time.monotonic())
            raise

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            if scope["path"] not in _HARMLESS:
                self._check_host(headers)
        except ApiError as problem:
            await self._refuse(problem, send)
            return
        if not (scope["path"].startswith(self._protected) or self._is_admin(scope)):
            # The body of such a request, if it has one, is not read: the connection ends with the answer.
            has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
            await self._app(scope, receive, _closing(send) if has_body else send)
            return
        async with AsyncExitStack() as stack:
            await self._serve(scope, receive, send, headers, stack)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes], stack: AsyncExitStack
    ) -> None:
        """Check a request's key and pass it on with its whole body."""
        try:
            self._check_size(scope)
            caller = self._authenticate(scope, headers)
            scope["state"]["caller"] = caller
            if scope["method"] == "POST":
                caller.charge_request(time.monotonic())
            share = stack.enter_context(self._desk.share(caller.name))
            with anyio.fail_after(self._body_seconds):
                body = await self._body(headers, receive, share)
            if body is None:
                return
            share.grow(body_memory(body))
            if len(body) >= LONG_BODY:
                scope["state"]["turn"] = turn = await stack.enter_async_context(AsyncExitStack())
                await turn.enter_async_context(self._desk.bodies.turn(caller.name, len(body)))
        except ApiError as problem:
            await self._refuse(problem, send)
            return
        except TimeoutError:
            message = f"the request's body was not here within {self._body_seconds:g} s; send it faster"
            await self._refuse(ApiError(408, message, "body_timeout"), send)
            return
        CALLER.set(caller)
        pending = [body]

        async def replay() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a WebSocket's host and key. Each of its messages is charged."""
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        state["access_log"] = self._access_log
        try:
            self._check_host(headers)
            self._check_size(scope)
            caller = self._authenticate(scope, headers)
        except ApiError as problem:
            self._access_log.write(scope, problem.status, 0.0, None)
            self._metrics.refused.labels(str(problem.status), problem.code).inc()
            await receive()
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": problem.message[:100]})
            return
        state["caller"] = caller
        CALLER.set(caller)
        async with self._desk.socket(caller.name) as allowed:
            if allowed:
                await self._app(scope, receive, send)
                return
        self._access_log.write(scope, 429, 0.0, None)
        self._metrics.refused.labels("429", "too_many_sockets").inc()
        await receive()
        await send({"type": "websocket.close", "code": _TRY_AGAIN, "reason": "the key has too many WebSockets open"})

    def _check_size(self, scope: Scope) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes:
            message = f"the request's headers have {size} bytes; {self._max_header_bytes} are allowed"
            raise ApiError(431, message, "headers_too_large")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, share: Share) -> bytes | None:
        """Return the whole body; None if the client has disconnected."""
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
            share.grow(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    async def _refuse(self, problem: ApiError, send: Send) -> None:
        self._metrics.refused.labels(str(problem.status), problem.code).inc()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]  # the body was not read
        headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(problem.body).encode()})


def _closing(send: Send) -> Send:
    """Announce that the connection ends with the answer."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    return closing


def _authorization(headers: dict[bytes, bytes]) -> str | None:
    """The `Authorization` header, or what `X-Api-Key`, the header of Anthropic's clients, amounts to."""
    if b"authorization" in headers:
        return headers[b"authorization"].decode("latin-1")
    return f"Bearer {headers[b'x-api-key'].decode('latin-1')}" if b"x-api-key" in headers else None

"""The first middleware: request id, path and encoding of the body."""

from __future__ import annotations

import json
import logging
import re
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trtqwen.gateway.connections import is_trusted
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.metrics import Metrics

_ID = re.compile(rb"[!-~]{1,128}")
_SLASHES = re.compile("/{2,}")
_current: ContextVar[str] = ContextVar("request_id", default="-")


class Front:
    """ASGI middleware. `scope["state"]["request_id"]` is the request's id: the client's `X-Request-Id`, or a new one.

    - The id comes back as the header `x-request-id`, with errors too.
    - Repeated and trailing slashes count as one and none. A prefix that a proxy leaves in the path is taken off.
    - HEAD is answered as GET, without the body.

    Args:
        prefix: of all paths, such as `/llm`; a trusted proxy may also name it in `X-Forwarded-Prefix`.
        trusted: networks of proxies, whose `X-Forwarded-For` names the client.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, prefix: str = "", trusted: tuple[str, ...] = ()) -> None:
        self._app = app
        self._metrics = metrics
        self._prefix = prefix
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        token = _current.set(request_id)
        forwarded = bool(self._trusted and scope["client"]) and is_trusted(scope["client"][0], self._trusted)
        scope = {**scope, "path": self._path(scope["path"], headers if forwarded else {})}
        if forwarded:
            scope["client"] = self._client(headers, scope["client"])
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        if scope.get("method") == "HEAD":
            scope["method"] = "GET"  # the server itself leaves out the body
        extra = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message["headers"] = [*message.get("headers", ()), extra]
            await send(message)

        try:
            encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
            if encoding.lower() not in ("", "identity"):
                message = f"the body has Content-Encoding {encoding!r}; send it without"
                await self._refuse(ApiError(415, message, "unsupported_encoding"), send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            _current.reset(token)

    def _client(self, headers: dict[bytes, bytes], proxy: tuple[str, int]) -> tuple[str, int]:
        """The address behind the trusted proxies: each adds the one that it sees at the end."""
        chain = [part.strip() for part in headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")]
        for address in reversed(chain):
            if address and not is_trusted(address, self._trusted):
                return (address[:64], 0)
        return proxy

    def _path(self, path: str, headers: dict[bytes, bytes]) -> str:
        path = _SLASHES.sub("/", path)
        for prefix in (self._prefix, headers.get(b"x-forwarded-prefix", b"").decode("latin-1")):
            prefix = prefix.rstrip("/")
            if prefix and (path == prefix or path.startswith(f"{prefix}/")):
                path = path[len(prefix) :]
                break
        return path.rstrip("/") or "/"

    async def _refuse(self, problem: ApiError, send: Send) -> None:
        self._metrics.refused.labels(str(problem.status), problem.code).inc()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]  # the body was not read
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(problem.body).encode()})


class RequestIds(logging.Filter):
    """Gives log records the field `request_id`: that of the request they are about, or `-`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = _current.get()
        return True

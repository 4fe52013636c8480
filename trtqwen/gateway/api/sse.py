"""Server-sent events as raw frames, and disconnected clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_KEEP_ALIVE = b": keep-alive\n\n"
_KEEP_ALIVE_SECONDS = 15.0  # proxies cut connections that are silent for longer
_UNREAD_SECONDS = 60.0  # a client that does not read for this time counts as disconnected
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the frames
]

SERVER_SEND = "server_send"  # in a scope's state: the server's own `send`, which knows of no middleware
T = TypeVar("T")


class ClientGone(Exception):
    """The client has disconnected."""


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """Await `work()`, but cancel it when the client closes the connection.

    Raises:
        ClientGone: if it did.
    """

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work()), asyncio.create_task(until_gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends frames, and a comment after a long pause; stops when the client disconnects.

    Args:
        first, rest: whole events with their blank lines; `rest` is closed in any case.
        failed: the last event, in place of an exception of `rest`.
        ended: called at the end with whether the client disconnected before.
    """

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        failed: Callable[[Exception], bytes],
        ended: Callable[[bool], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._first = first
        self._rest = rest
        self._failed = failed
        self._ended = ended
        self._extra = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self._sent_at = time.monotonic()
        self._sending = False
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *self._extra]})
        send = scope.get("state", {}).get(SERVER_SEND, send)  # no middleware has to do with the frames
        tasks = asyncio.create_task(self._send_frames(send)), asyncio.create_task(self._watch(receive, send))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_frames(self, send: Send) -> None:
        gone = True
        try:
            async with aclosing(self._rest) as rest:
                frame: bytes | None = self._first
                while frame is not None:
                    await self._send(send, frame)
                    try:
                        frame = await anext(rest, None)
                    except Exception as problem:
                        await self._send(send, self._failed(problem))
                        break
            gone = False
        finally:
            self._ended(gone)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, frame: bytes) -> None:
        self._sending = True
        await send({"type": "http.response.body", "body": frame, "more_body": True})
        self._sending = False
        self._sent_at = time.monotonic()

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Return when the client has disconnected."""
        message: asyncio.Task[Message] = asyncio.ensure_future(receive())
        try:
            while True:
                await asyncio.wait((message,), timeout=_KEEP_ALIVE_SECONDS)
                if message.done():
                    if message.result()["type"] == "http.disconnect":
                        return
                    message = asyncio.ensure_future(receive())
                silence = time.monotonic() - self._sent_at
                if self._sending and silence > _UNREAD_SECONDS:
                    return
                if not self._sending and silence >= _KEEP_ALIVE_SECONDS:
                    await self._send(send, _KEEP_ALIVE)
        finally:
            message.cancel()


def frame(content: str) -> bytes:
    """An event that carries `content`, which has no line breaks."""
    return f"data: {content}\n\n".encode()


DONE = frame("[DONE]")

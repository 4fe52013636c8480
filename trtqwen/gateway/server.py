"""The gateway's HTTP server: uvicorn, with a limit on headers, and a stop that finishes what runs."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trtqwen.gateway.admission.gate import stopping
from trtqwen.gateway.app import create_app
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.listener import bind
from trtqwen.gateway.state import Runtime

_CLOSE_SECONDS = 3  # for last frames to reach their clients
_KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep idle connections: who closes first loses no request


def serve(
    config: GatewayConfig, listener: socket.socket | None = None, on_start: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new requests, finish what runs, and return. For the main thread.

    Args:
        listener: a bound socket to serve on, instead of the config's address.
        on_start: called once clients are answered.

    Raises:
        InputError: if the config cannot be used.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are about what clients send
    app = create_app(config)
    settings = uvicorn.Config(
        app,
        http=_protocol(config),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        backlog=1024,
    )
    with listener or bind(config) as listening:
        _Server(settings, app, config.drain_seconds, on_start).run(sockets=[listening])


class _Server(uvicorn.Server):
    """A server for which a signal is a request to drain; a second one ends it at once."""

    def __init__(
        self, settings: uvicorn.Config, app: FastAPI, drain_seconds: float, on_start: Callable[[], None]
    ) -> None:
        super().__init__(settings)
        self._app = app
        self._drain_seconds = drain_seconds
        self._on_start = on_start
        self._asked_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked_at is not None and not self.should_exit:
            runtime: Runtime = self._app.state.runtime
            runtime.gate.drain()
            if time.monotonic() - self._asked_at > self._drain_seconds:
                runtime.gate.send_away(stopping())
                runtime.generator.abort_all(stopping())
                self.should_exit = True
            elif runtime.gate.idle:
                self.should_exit = True
        return await super().on_tick(counter)


def _protocol(config: GatewayConfig) -> type[HttpToolsProtocol]:
    class Protocol(_LimitedProtocol):
        max_header_bytes = config.max_header_bytes
        header_seconds = config.body_seconds

    return Protocol


class _LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose headers are cut off when they do not end; the parser itself has no limit."""

    max_header_bytes: int
    header_seconds: float
    _too_late: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > self.max_header_bytes and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 \r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        self._too_late.cancel()
        self._expect_headers()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)
            return
        # A trailer, after a chunked body; nobody reads them.
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self.max_header_bytes:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._too_late.cancel()
        self._in_headers = False
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._too_late.cancel()
        # uvicorn leaves it after a reset, and with it all of the connection until the time is over.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._in_headers = True
        self._too_late = self.loop.call_later(self.header_seconds, self._give_up)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

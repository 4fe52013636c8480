"""HTTP/1: uvicorn's protocol with limits and missing features.

- An `Upgrade` header for anything but a WebSocket is ignored (RFC 9110, 7.8). Every Java HttpClient sends `h2c`.
- Answers to HTTP/1.0 have no chunk sizes (RFC 9112, 6.1); they end with the connection.
- A client that closes its sending half is answered.
- Pipelined requests, unread answers and connections are bounded, in all and for each address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trtqwen.gateway.api.sse import SERVER_SEND
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.connections import Connections, connection_limits

_FIRST_PROBE, _LONGEST_PAUSE = 0.2, 5.0  # seconds
_MOST_PIPELINED = 16  # requests that wait behind one of the same connection
_UNREAD_SECONDS = 60
_END_OF_HEADERS = b"\r\n\r\n"
_PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"  # clients must skip 1xx answers: RFC 9110, 15.2


def protocol(config: GatewayConfig) -> type[HttpToolsProtocol]:
    """The protocol class with the limits of a config."""

    limits = connection_limits(config.max_connections, config.max_connections_per_address, config.trusted_proxies)

    class Configured(_Protocol):
        max_header_bytes = config.max_header_bytes
        header_seconds = config.body_seconds
        connection_limits = limits

    return Configured


class _Protocol(HttpToolsProtocol):
    """Limits the size of headers, which the parser does not."""

    max_header_bytes: int
    header_seconds: float
    connection_limits: Connections
    held = 0
    _too_late: asyncio.TimerHandle
    _unread: asyncio.TimerHandle | None = None
    _counted = _began = False
    _probe: asyncio.TimerHandle | None = None
    _ignores_upgrade = False
    _method = _version = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()
        self._counted = self.connection_limits.enter(self, self._address)
        if not self._counted:
            transport.abort()

    def drop(self) -> None:
        """Close the connection immediately, because others need its place."""
        self.transport.abort()

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def pause_writing(self) -> None:
        """Limit the time in which a client does not read its answer."""
        super().pause_writing()
        self.connection_limits.unread(self)
        if self._unread is None:
            self._unread = self.loop.call_later(_UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.connection_limits.read(self)
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._began = False
        self._feed(data)
        if self._in_headers:
            # Of a chunk in which the request began, what comes before it is another's.
            own = len(data.rpartition(_END_OF_HEADERS)[2]) if self._began else len(data)
            self._header_bytes += own
            if not self.transport.is_closing():
                self.connection_limits.hold(self, own)
        if self._in_headers and self._header_bytes > self.max_header_bytes and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 \r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection of a client that still waits for its answer.

        A disconnected client looks the same, but does not take another packet: `_ask` sends some.
        """
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self._probe = self.loop.call_later(_FIRST_PROBE, self._ask, _FIRST_PROBE)
        return True

    def on_body(self, body: bytes) -> None:
        if self.pipeline:
            self.connection_limits.hold(self, len(body))  # its request has not begun
        super().on_body(body)

    def on_response_complete(self) -> None:
        behind = bool(self.pipeline)
        super().on_response_complete()
        if not behind:
            self.connection_limits.release(self)
            if self._counted:
                self.connection_limits.idle(self, self._address)
        if self._probe is not None and self.cycle.response_complete:
            self.transport.close()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MOST_PIPELINED:
            self.transport.abort()
            raise ConnectionAbortedError  # the parser stops here
        self._too_late.cancel()
        self._began = True
        self._expect_headers()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)
            return
        # A trailer after a chunked body: ignored, but counted.
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self.max_header_bytes:
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._ignores_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._ignores_upgrade and not (self._should_upgrade() and self.parser.get_method() == b"GET"):
            self._method, self._version = self.parser.get_method(), self.parser.get_http_version().encode()
            return  # the parser skips the body of such a request: `_feed` starts it again
        self._ignores_upgrade = False
        self._too_late.cancel()
        self._in_headers = False
        self.connection_limits.busy(self, self._address)
        if not self.pipeline:
            self.connection_limits.release(self)
        super().on_headers_complete()
        if self.cycle is None or self.cycle.scope is not self.scope:
            return
        if self.scope["http_version"] == "1.0":
            _send_without_chunks(self.cycle)
        self.scope["state"][SERVER_SEND] = self.cycle.send

    def on_message_complete(self) -> None:
        if not self._ignores_upgrade:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._too_late.cancel()
        if self._counted:
            self.connection_limits.leave(self, self._address)
        if self._unread is not None:
            self._unread.cancel()
        self.pipeline.clear()
        if self._probe is not None:
            self._probe.cancel()
        # uvicorn leaves it after a reset, and with it all of the connection until the time is over.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._ignores_upgrade:
                self.parser = httptools.HttpRequestParser(self)
                self._feed(self._head_without_upgrade() + data[upgrade.args[0] :])
            elif self._should_upgrade():
                self.handle_websocket_upgrade()
            else:  # CONNECT
                self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserError:
            if not self.transport.is_closing():
                self.send_400_response("Invalid HTTP request received.")

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over; it counts until it ends."""
        self._too_late.cancel()
        super().handle_websocket_upgrade()
        protocol: Any = self.transport.get_protocol()
        lost, counted, self._counted = protocol.connection_lost, self._counted, False
        self.connection_limits.busy(self, self._address)

        def connection_lost(problem: Exception | None) -> None:
            if counted:
                self.connection_limits.leave(self, self._address)
            lost(problem)

        protocol.connection_lost = connection_lost

    def _head_without_upgrade(self) -> bytes:
        lines = [
            b"%s %s HTTP/%s" % (self._method, self.url, self._version),
            *(b"%s: %s" % header for header in self.headers if header[0] not in (b"upgrade", b"connection")),
        ]
        options = {
            option.strip().lower()
            for name, value in self.headers
            if name == b"connection"
            for option in value.split(b",")
        }
        if kept := options & {b"close", b"keep-alive"}:
            lines.append(b"connection: " + b", ".join(sorted(kept)))
        return b"\r\n".join([*lines, b"", b""])

    def _ask(self, pause: float) -> None:
        """Send an interim answer to a half-closed connection: one that is closed whole resets it at the next."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if not self.cycle.response_started and not self.pipeline and self.cycle.scope["http_version"] == "1.1":
            self.transport.write(_PROCESSING)
        self._probe = self.loop.call_later(pause, self._ask, min(2 * pause, _LONGEST_PAUSE))

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._in_headers = True
        self._too_late = self.loop.call_later(self.header_seconds, self._give_up)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def _send_without_chunks(cycle: RequestResponseCycle) -> None:
    """Have a cycle send bodies of unknown length as they are."""
    send: Callable[[Any], Any] = cycle.send
    framed = True

    async def send_plain(message: Any) -> None:
        nonlocal framed
        if message["type"] == "http.response.start":
            framed = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not framed:
                cycle.chunked_encoding = False
        elif not framed:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]

"""The gateway's HTTP server: uvicorn with a limit on headers, and a stop that finishes running requests."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from trtqwen.gateway.admission.gate import stopping
from trtqwen.gateway.admission.shared import Link
from trtqwen.gateway.app import create_app
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.fleet.fleet import Fleet
from trtqwen.gateway.front import RequestIds
from trtqwen.gateway.listener import bind
from trtqwen.gateway.protocol import protocol
from trtqwen.system.limits import raise_file_limit

_CLOSE_SECONDS = 3  # for last frames to reach their clients
_KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep idle connections: who closes first loses no request


def serve(
    config: GatewayConfig,
    listener: socket.socket | None = None,
    on_start: Callable[[], None] = lambda: None,
    link: Link | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new requests, finish running ones, and return. For the main thread.

    Args:
        listener: a bound socket to serve on, instead of the config's address.
        on_start: called once clients are answered.
        link: to the broker, in one of several workers.

    Raises:
        InputError: if the config cannot be used.
    """
    handler = logging.StreamHandler()
    handler.addFilter(RequestIds())
    form = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are about what clients send
    access = logging.getLogger("trtqwen.access")
    access.setLevel(logging.INFO)
    access.propagate = False
    access.addHandler(logging.StreamHandler())  # JSON alone on its lines
    signal.signal(signal.SIGHUP, lambda number, frame: None)  # a changed keys file is read again by itself
    raise_file_limit()
    app = create_app(config, link=link)
    settings = uvicorn.Config(
        app,
        http=protocol(config),
        ws="wsproto",
        ws_max_size=app.state.max_body_bytes,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # uvicorn trusts every client from loopback; `Front` asks for `trusted_proxies`
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        backlog=1024,
    )
    with listener or bind(config) as listening:
        _Server(settings, app, config.drain_seconds, on_start).run(sockets=[listening])


class _Server(uvicorn.Server):
    """A server for which a signal is a request to drain; a second one ends running requests with an error.

    A third one does not wait until clients have received that error.
    """

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
        elif self._drain_seconds:
            self._drain_seconds = 0
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked_at is not None and not self.should_exit:
            fleet: Fleet = self._app.state.fleet
            fleet.drain()
            fleet.send_away(stopping())  # they may still have their turn elsewhere
            if time.monotonic() - self._asked_at > self._drain_seconds:
                fleet.abort_all(stopping())
                self.should_exit = True
            elif fleet.idle:
                self.should_exit = True
        return await super().on_tick(counter)

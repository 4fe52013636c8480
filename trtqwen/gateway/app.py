"""The gateway as an ASGI application."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from trtqwen import __version__
from trtqwen.gateway.admission.auth import read_keys
from trtqwen.gateway.admission.desk import Desk
from trtqwen.gateway.admission.middleware import Guard
from trtqwen.gateway.admission.rates import open_keys
from trtqwen.gateway.admission.shared import Link, shared_authenticator
from trtqwen.gateway.api import admin, messages, responses, routes, service, websocket
from trtqwen.gateway.api.failures import add_handlers
from trtqwen.gateway.api.select import Leases
from trtqwen.gateway.config import LOOPBACK_ORIGINS, LOOPBACK_PATTERN, GatewayConfig
from trtqwen.gateway.fleet.engines import load_models
from trtqwen.gateway.fleet.fleet import Fleet
from trtqwen.gateway.fleet.table import first_table
from trtqwen.gateway.front import Front
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.state import Connect
from trtqwen.gateway.tracing import Traced, tracing_is_on

_BYTES_A_TOKEN = 32  # of a JSON body: English takes 4 to 5, Chinese written as \u escapes 9 to 12


def create_app(config: GatewayConfig, connect: Connect = Replica, link: Link | None = None) -> FastAPI:
    """The application; it connects to Triton when a server starts it.

    Args:
        connect: makes the replica of each address.
        link: to the broker, in one of several workers.

    Raises:
        InputError: if a repository, its chat template, the table of models or a keys file cannot be used.
    """
    table = first_table(config)
    models = load_models(table)
    authenticator = open_keys(config) if link is None else shared_authenticator(read_keys(config.api_keys), link)
    admins = None if config.admin_keys is None else read_keys(config.admin_keys)
    metrics = Metrics()
    context = max(model.limits.max_seq_len for model in models.values())
    largest = config.max_body_bytes or max(1 << 20, _BYTES_A_TOKEN * context)
    cpus = len(os.sched_getaffinity(0))
    desk = Desk(config.request_memory, len(authenticator.callers), cpus, config.queue_seconds, largest)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        fleet = Fleet(config, table, models, metrics, connect, link, len(authenticator.callers))
        async with fleet.running():
            app.state.fleet = fleet
            yield

    app = FastAPI(
        title="trtqwen", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    for router in (routes.router, responses.router, messages.router, websocket.router, service.router):
        app.include_router(router)
    if admins is not None:
        app.include_router(admin.router)
    add_handlers(app)
    app.state.max_body_bytes = largest
    app.state.desk = desk
    app.add_middleware(Leases)
    app.add_middleware(
        Guard,
        authenticator=authenticator,
        admins=admins,
        metrics=metrics,
        max_header_bytes=config.max_header_bytes,
        max_body_bytes=largest,
        desk=desk,
        body_seconds=config.body_seconds,
        allowed_hosts=_allowed_hosts(config),
        access_log=bool(authenticator.callers) if config.access_log is None else config.access_log,
        protect_metrics=config.protect_metrics,
    )
    if tracing_is_on():
        app.add_middleware(Traced)
    app.add_middleware(Front, metrics=metrics, prefix=config.path_prefix, trusted=config.trusted_proxies)
    # The last one is the first that a request meets: a preflight request has no key and no body.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_origin_regex=LOOPBACK_PATTERN if LOOPBACK_ORIGINS in config.allowed_origins else None,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "x-trtqwen-ignored"),
    )
    return app


def _allowed_hosts(config: GatewayConfig) -> frozenset[str] | None:
    if config.allowed_hosts is not None:
        return frozenset(map(str.lower, config.allowed_hosts))
    if config.api_keys is not None or not config.loopback:
        return None
    return frozenset({"localhost", "127.0.0.1", "[::1]", config.host, socket.gethostname().lower()})

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
from trtqwen.gateway.admission.broker import Link, shared_authenticator
from trtqwen.gateway.admission.desk import Desk
from trtqwen.gateway.admission.middleware import Guard
from trtqwen.gateway.admission.rates import open_keys
from trtqwen.gateway.api import messages, responses, routes, service, websocket
from trtqwen.gateway.api.failures import add_handlers
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import LOOPBACK_ORIGINS, LOOPBACK_PATTERN, GatewayConfig
from trtqwen.gateway.front import Front
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import load_model
from trtqwen.gateway.state import Connect, running
from trtqwen.gateway.tracing import Traced, tracing_is_on

_BYTES_A_TOKEN = 32  # of a JSON body: English takes 4 to 5, Chinese written as \u escapes 9 to 12


def create_app(config: GatewayConfig, connect: Connect = Replica, link: Link | None = None) -> FastAPI:
    """The application; it connects to Triton when a server starts it.

    Args:
        connect: makes the replica of each address.
        link: to the broker, in one of several workers.

    Raises:
        InputError: if the repository, its chat template or the keys file cannot be used.
    """
    model = load_model(config.repository, config.model_name)
    template = model.tokenizer.chat_template
    authenticator = open_keys(config) if link is None else shared_authenticator(read_keys(config.api_keys), link)
    metrics = Metrics()
    largest = config.max_body_bytes or max(1 << 20, _BYTES_A_TOKEN * model.limits.max_seq_len)
    cpus = len(os.sched_getaffinity(0))
    desk = Desk(config.request_memory, len(authenticator.callers), cpus, config.queue_seconds, largest)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        chat = None if template is None else ChatTemplate(template)
        keys = len(authenticator.callers)
        async with running(config, model, chat, metrics, connect, link, keys=keys) as runtime:
            app.state.runtime = runtime
            yield

    app = FastAPI(
        title="trtqwen", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    for router in (routes.router, responses.router, messages.router, websocket.router, service.router):
        app.include_router(router)
    add_handlers(app)
    app.state.max_body_bytes = largest
    app.state.desk = desk
    app.add_middleware(
        Guard,
        authenticator=authenticator,
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

"""The gateway as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from trtqwen import __version__
from trtqwen.gateway.admission.auth import read_keys
from trtqwen.gateway.admission.middleware import Guard
from trtqwen.gateway.api import routes
from trtqwen.gateway.api.sse import ClientGone
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import load_model
from trtqwen.gateway.state import running

_BYTES_A_TOKEN = 32  # of a JSON body: English takes 4 to 5, Chinese written as \u escapes 9 to 12


def create_app(config: GatewayConfig) -> FastAPI:
    """The application; it connects to Triton when a server starts it.

    Raises:
        InputError: if the repository, its chat template or the keys file cannot be used.
    """
    model = load_model(config.repository, config.model_name)
    template = model.tokenizer.chat_template
    authenticator = read_keys(config.api_keys)
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(config, model, None if template is None else ChatTemplate(template), metrics) as runtime:
            app.state.runtime = runtime
            yield

    app = FastAPI(title="trtqwen", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(routes.router)
    app.add_exception_handler(ApiError, routes.on_api_error)
    app.add_exception_handler(RequestValidationError, routes.on_invalid_request)
    app.add_exception_handler(HTTPException, routes.on_http_error)
    app.add_exception_handler(ClientGone, routes.on_client_gone)
    app.add_exception_handler(Exception, routes.on_failure)
    app.add_middleware(
        Guard,
        authenticator=authenticator,
        metrics=metrics,
        max_header_bytes=config.max_header_bytes,
        max_body_bytes=config.max_body_bytes or max(1 << 20, _BYTES_A_TOKEN * model.limits.max_seq_len),
        body_seconds=config.body_seconds,
    )
    return app

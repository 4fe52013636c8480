"""One OpenTelemetry trace for each request, with spans for queue and engine, and the time of the first token.

The standard variable `OTEL_EXPORTER_OTLP_ENDPOINT` turns it on; the extra `otel` brings the packages. A client's
`traceparent` is continued, and Triton continues ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trtqwen import __version__
from trtqwen.diagnostics import InputError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PATHS = ("/v1/", "/generate")  # that make tokens, when something is posted there


class Span:
    """A span of a request; this base class records nothing."""

    def child(self, name: str, **attributes: Any) -> Span:
        """Start a child span; call `end` on it."""
        return self

    def event(self, name: str) -> None:
        """Record that something happened now."""

    def end(self, error: str | None = None, **attributes: Any) -> None:
        """End it.

        Args:
            error: why it failed.
        """

    @property
    def headers(self) -> Mapping[str, str]:
        """Return the headers with which a called server continues the trace."""
        return {}


_NOTHING = Span()
_current: ContextVar[Span] = ContextVar("span", default=_NOTHING)


def current_span() -> Span:
    """The span of the request that is being answered."""
    return _current.get()


class _Recorded(Span):
    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span

    def child(self, name: str, **attributes: Any) -> Span:
        from opentelemetry.trace import set_span_in_context

        return _Recorded(
            self._tracer, self._tracer.start_span(name, set_span_in_context(self._span), attributes=attributes)
        )

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def end(self, error: str | None = None, **attributes: Any) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()

    @property
    def headers(self) -> Mapping[str, str]:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return carrier


class Traced:
    """ASGI middleware: a span for each request that makes tokens, from its arrival to the end of its answer.

    Raises:
        InputError: if tracing is on and its packages are missing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._provider = _provider()
        self._tracer = self._provider.get_tracer("trtqwen", __version__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            self._provider.shutdown()  # sends what was not sent yet
            return
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith(_PATHS):
            await self._app(scope, receive, send)
            return
        span = self._begin(scope)
        token, status = _current.set(span), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            _current.reset(token)
            state = scope.get("state", {})
            identity = {"http.response.status_code": status, "trtqwen.request_id": state.get("request_id", "")}
            span.end(f"status {status}" if status >= 500 or not status else None, **identity)

    def _begin(self, scope: Scope) -> Span:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = TraceContextTextMapPropagator().extract(carrier)
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        name = f"{scope['method']} {scope['path']}"
        span = self._tracer.start_span(name, context, kind=SpanKind.SERVER, attributes=attributes)
        return _Recorded(self._tracer, span)


def tracing_is_on() -> bool:
    """Whether traces are exported."""
    return bool(os.environ.get(ENDPOINT))


def _provider() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InputError(f"{ENDPOINT} is set and OpenTelemetry is not installed", "install trtqwen[otel]") from None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "trtqwen-gateway")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider

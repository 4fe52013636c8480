"""One trace for each request, from the client through the gateway to a real Triton."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="install the extra otel")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.gateway.conftest import quick_gateway, quick_triton
from tests.waiting import wait_for
from trtqwen.gateway.tracing import ENDPOINT, Span, current_span

PARENT = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector:
    """Receives spans over OTLP/HTTP."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.triton: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Type"] == "application/json":  # as Triton sends them
                    for found in json.loads(body)["resourceSpans"]:
                        collector.triton += [span for scope in found["scopeSpans"] for span in scope["spans"]]
                    body = b""
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    [service] = [
                        a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
                    ]
                    collector.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[Collector]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def trace(self, trace_id: str) -> dict[str, Any]:
        """The gateway's spans of a trace by name."""
        return {span.name: span for _, span in self.spans if span.trace_id.hex() == trace_id}


@pytest.mark.triton
def test_a_request_is_one_trace(stand_in_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector().running() as collector:
        monkeypatch.setenv(ENDPOINT, collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with (
            quick_triton(stand_in_repository) as triton,
            quick_gateway(triton, stand_in_repository) as running,
        ):
            body = {"model": "qwen", "messages": [{"role": "user", "content": "/again 20 a"}], "max_tokens": 10}
            status, headers, _ = running.post(
                "/v1/chat/completions", body, {"traceparent": f"00-{PARENT}-00f067aa0ba902b7-01"}
            )
            assert status == 200
            assert wait_for(
                lambda: {"queue", "engine", "POST /v1/chat/completions"} <= collector.trace(PARENT).keys()
            )
            spans = collector.trace(PARENT)
            whole, queue, engine = spans["POST /v1/chat/completions"], spans["queue"], spans["engine"]
            assert whole.parent_span_id.hex() == "00f067aa0ba902b7"
            assert queue.parent_span_id == engine.parent_span_id == whole.span_id
            assert [event.name for event in engine.events] == ["first token"]
            assert engine.start_time_unix_nano <= engine.events[0].time_unix_nano <= engine.end_time_unix_nano
            assert whole.start_time_unix_nano <= queue.start_time_unix_nano
            assert queue.end_time_unix_nano <= engine.start_time_unix_nano
            tokens = {a.key: a.value.int_value for a in engine.attributes if a.value.HasField("int_value")}
            assert tokens["gen_ai.usage.output_tokens"] == 10
            text = {a.key: a.value.string_value for a in whole.attributes if a.value.HasField("string_value")}
            assert text["trtqwen.request_id"] == headers["x-request-id"]
            # Triton takes part in the same trace, below our span.
            parent = engine.span_id.hex()
            assert wait_for(
                lambda: any(s["traceId"] == PARENT and s.get("parentSpanId") == parent for s in collector.triton)
            ), collector.triton
            running.post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "/fail no"}]})
            assert wait_for(lambda: any(s.name == "engine" and s.status.code == 2 for _, s in collector.spans))


def test_without_an_endpoint_nothing_is_recorded() -> None:
    span = current_span()
    assert type(span) is Span
    assert span.child("queue") is span
    assert span.headers == {}
    span.event("first token")
    span.end()

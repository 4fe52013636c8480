"""The access log: one line of JSON per request, without prompts and answers."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any, Protocol

from starlette.types import Scope

from trtqwen.gateway.metrics import Metrics

_PROBED = ("/health", "/ready", "/metrics")  # by machines, every few seconds
_GONE = 499  # the client disconnected before the answer
_LONGEST_PATH = 200  # characters
_log = logging.getLogger("trtqwen.access")


class Tokens(Protocol):
    """Number of tokens of a request so far."""

    prompt_tokens: int
    output_tokens: int


class AccessLog:
    """Counts requests and tokens by API key, and writes the lines.

    Args:
        on: whether it writes them.
        always: beginnings of paths whose lines are written in any case.
    """

    def __init__(self, metrics: Metrics, *, on: bool, always: tuple[str, ...] = ()) -> None:
        self._metrics = metrics
        self._on = on
        self._always = always

    def write(self, scope: Scope, status: int, seconds: float, usage: Tokens | None) -> None:
        """Count a request, and write its line.

        Args:
            status: of the answer; 0 if the client disconnected before it.
            usage: None if the request has no tokens.
        """
        if scope["path"] in _PROBED:
            return
        state: dict[str, Any] = scope["state"]
        key = state["caller"].name if "caller" in state else None
        status = status or _GONE
        self._metrics.key_requests.labels(key or "-", str(status)).inc()
        if usage is not None:
            self._metrics.key_tokens.labels(key or "-").inc(usage.prompt_tokens + usage.output_tokens)
        if not self._on and not scope["path"].startswith(self._always):
            return
        entry = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "address": scope["client"][0] if scope.get("client") else None,
            "key": key,
            "method": scope.get("method", "WEBSOCKET"),
            "path": scope["path"][:_LONGEST_PATH],
            "status": status,
            "seconds": round(seconds, 4),
            "prompt_tokens": usage.prompt_tokens if usage is not None else None,
            "output_tokens": usage.output_tokens if usage is not None else None,
            "request_id": state.get("request_id"),
        }
        _log.info("%s", json.dumps(entry))

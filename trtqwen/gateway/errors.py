"""Errors as OpenAI's clients expect them: a status and `{"error": {"message", "type", "param", "code"}}`.

Anthropic's clients find theirs in the same object: it also has `"type": "error"`, and the names of the types agree.
"""

from __future__ import annotations

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import grpc

from trtqwen.diagnostics import TrtQwenError

_ENGINE_ERRORS = Path(__file__).with_name("engine_errors.json")
_INNER = (
    re.compile(r"\[enforce fail at [^\]]*\]"),
    re.compile(r"\S+\.(?:cpp|cu|cc|h|py):\d+"),
    re.compile(r"(?:/[\w.+@-]+){2,}/?"),
    re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?|\[[0-9a-f:]+\]:\d+"),
    re.compile(r"\b(?:trtqwen-[0-9a-f]+\S*)"),
)
_log = logging.getLogger(__name__)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(TrtQwenError):
    """The error of a request.

    Args:
        code: short name for programs, and the label under which the metrics count it.
        param: the field of the request with the error.
        retry_after: seconds after which another try may succeed.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "type": "error"}

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that make the same error in another process, as JSON takes them."""
        retry = self.headers.get("Retry-After")
        return {
            "status": self.status,
            "message": self.message,
            "code": self.code,
            "param": self.param,
            "retry_after": None if retry is None else int(retry),
        }


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error for a request that is invalid; `message` ends with what to do."""
    return ApiError(400, message, code, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """Return the error for a valid request that this server cannot serve."""
    return ApiError(400, message, "unsupported", param=param)


def late() -> ApiError:
    """Return the error for an answer that passed `request_seconds`."""
    return ApiError(504, "the answer was not finished in time; ask for fewer tokens", "timeout")


def from_engine(text: str) -> ApiError:
    """Return the error for an engine's error text, because Triton's codes do not distinguish errors."""
    for known in _known():
        if known["text"] in text:
            status: int = known["status"]
            return ApiError(status, public(text), known["code"], retry_after=1 if status in (429, 503) else None)
    _log.error("the engine failed: %s", text)
    return ApiError(500, f"the engine failed: {public(text)}", "engine_error")


def public(text: str) -> str:
    """Return an engine's text without paths, addresses and places in source files."""
    for pattern in _INNER:
        text = pattern.sub("...", text)
    return text


def from_rpc(address: str, problem: grpc.RpcError) -> ApiError:
    """Return the error for a failed gRPC call to a replica."""
    code, details = problem.code(), problem.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return late()
    if code is grpc.StatusCode.UNAVAILABLE:
        return ApiError(503, "the engine does not answer; try again", "engine_dead", retry_after=1)
    return from_engine(details)


@cache
def _known() -> list[dict[str, Any]]:
    errors: list[dict[str, Any]] = json.loads(_ENGINE_ERRORS.read_text(encoding="utf-8"))["errors"]
    return errors

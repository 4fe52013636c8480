"""Selection of a request's engine by its model. The engine stays open until the request has ended."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from trtqwen.gateway.api.failures import fleet_of
from trtqwen.gateway.api.fields import missing_model
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.fleet.route import Route, Serving
from trtqwen.gateway.state import Runtime

_LEASES = "leases"  # in the scope's state: (context manager) of the engines that a request holds


def select(request: HTTPConnection, body: BaseModel) -> Runtime:
    """The engine for a request.

    Raises:
        ApiError: 404 for an unknown model.
    """
    fleet, name = fleet_of(request), getattr(body, "model", None)
    route = fleet.route(name)
    if route is None:
        raise missing_model(str(name), fleet.names)
    serving = route.pick(_who(request, body, route))
    hold = serving.engine.hold()
    hold.__enter__()
    request.scope["state"].setdefault(_LEASES, []).append(hold)
    request.state.serving = serving
    return serving.runtime


def runtime_of(request: HTTPConnection) -> Runtime:
    """The engine that `select` has chosen for a request."""
    serving: Serving = request.state.serving
    return serving.runtime


def check_room(request: HTTPConnection, priority: int = 0) -> None:
    """Refuse a request immediately if the selected engine has no room.

    Raises:
        ApiError: as `Gate.check_room` does.
    """
    serving: Serving = request.state.serving
    try:
        serving.runtime.gate.check_room(priority)
    except ApiError as problem:
        serving.observer.refused(problem.code)
        raise


def release(scope: Scope) -> None:
    """Release the engines of a request."""
    for hold in scope.get("state", {}).pop(_LEASES, ()):
        hold.__exit__(None, None, None)


class Leases:
    """ASGI middleware: a request holds its engine until its answer is sent, however it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            release(scope)


def _who(request: HTTPConnection, body: BaseModel, route: Route) -> str | None:
    """Return the key that keeps a request with a target; None for a random target."""
    sticky = route.entry.sticky
    if sticky == "none" or len(route.serving) == 1:
        return None
    caller: Any = getattr(request.state, "caller", None)
    key = None if caller is None or caller.name == "anonymous" else f"key {caller.name}"
    if sticky == "user":
        user = getattr(body, "user", None) or getattr(body, "safety_identifier", None)
        return f"user {user}" if user else key
    return key

"""`/admin`: show and change the engines of each model. Only a gateway with admin keys has these routes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response

from trtqwen.diagnostics import InputError
from trtqwen.gateway.api.failures import Json, fleet_of
from trtqwen.gateway.api.fields import missing_model
from trtqwen.gateway.api.respond import Route
from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.fleet.change import change_model
from trtqwen.gateway.fleet.fleet import Fleet
from trtqwen.gateway.fleet.report import report
from trtqwen.gateway.fleet.table import parse_entry

router = APIRouter(route_class=Route, prefix="/admin")


@router.get("/models")
async def models(request: Request) -> Response:
    """Return every model with its targets, the changes in progress, and the revision of the table."""
    return Json(fleet_of(request).status())


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model with its targets."""
    return _one(fleet_of(request), name)


@router.put("/models/{name:path}")
async def put_model(request: Request, name: str, entry: Annotated[dict[str, Any], Body()]) -> Response:
    """Add a model or replace its targets; answers when new requests go there."""
    fleet = fleet_of(request)
    try:
        wanted = parse_entry(entry, name)
    except InputError as problem:
        raise bad_request(str(problem)) from None
    await change_model(fleet, name, wanted, request.headers.get("if-match"))
    return _one(fleet, name)


@router.delete("/models/{name:path}")
async def delete_model(request: Request, name: str) -> Response:
    """Remove a model; requests that run finish."""
    fleet = fleet_of(request)
    await change_model(fleet, name, None, request.headers.get("if-match"))
    return Json(fleet.status())


@router.get("/report")
async def figures(request: Request) -> Response:
    """Return the figures of each target and the comparison."""
    text = fleet_of(request).metrics.text().decode()
    return Json({"models": [one.as_json() for one in report([text])]})


def _one(fleet: Fleet, name: str) -> Response:
    status = fleet.status()
    if name not in status["models"]:
        raise missing_model(name, list(status["models"]))
    return Json(
        {"name": name, "revision": status["revision"], "settled": status["settled"], **status["models"][name]}
    )

"""The routes that make no tokens: the page, the model, health, metrics, and the tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from trtqwen import __version__
from trtqwen.gateway.api.failures import Json, fleet_of
from trtqwen.gateway.api.fields import missing_model, refuse_unsupported
from trtqwen.gateway.api.prompt import Conversation
from trtqwen.gateway.api.respond import Route, work_out
from trtqwen.gateway.api.schemas import DetokenizeRequest, TokenizeRequest
from trtqwen.gateway.api.select import select
from trtqwen.gateway.errors import ApiError, bad_request
from trtqwen.gateway.fleet.fleet import Fleet
from trtqwen.gateway.state import Runtime
from trtqwen.gateway.supervision import read_supervision

router = APIRouter(route_class=Route)
_MOST_COUNTED = 4  # times the context: longer texts are not tokenized
_PAGE = Path(__file__).with_name("chat.html").read_bytes()
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)

_PAGE_HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/", include_in_schema=False)
async def chat_page() -> Response:
    """Return the chat page."""
    return Response(_PAGE, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models, the default first."""
    fleet = fleet_of(request)
    return Json({"object": "list", "data": [_model(fleet, name) for name in fleet.names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """A model, by its name or alias."""
    return Json(_model(fleet_of(request), name))


@router.get("/health")
async def health() -> Response:
    """Return whether this process works."""
    return Json({"status": "alive"})


@router.get("/ready")
@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def ready(request: Request) -> Response:
    """Whether new requests are taken and the engine of a model makes tokens."""
    fleet = fleet_of(request)
    if fleet.draining:
        return Json({"status": "stopping"}, 503)
    supervision = read_supervision(fleet.config.supervisor)
    more: dict[str, Any] = {"restarts": supervision.restarts}
    if len(fleet.names) > 1:
        more["models"] = fleet.states
    restarting = supervision.state == "restarting"
    # The monitor notices the end of an engine that was idle only when it asks the next time.
    alone = fleet.config.models is None and len(fleet.config.triton) == 1
    if fleet.ready and not (restarting and alone):
        return Json({"status": "ready", **more})
    return Json({"status": "restarting" if restarting else "the engine does not answer", **more}, 503)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """The description of the routes, made once."""
    state = request.app.state
    if not hasattr(state, "openapi"):
        state.openapi = json.dumps(request.app.openapi()).encode()
    return Response(state.openapi, media_type="application/json")


@router.get("/version")
async def version() -> Response:
    """The version of trtqwen."""
    return Json({"version": __version__})


@router.get("/load")
async def load(request: Request) -> Response:
    """Return the numbers of running and waiting answers."""
    text = fleet_of(request).metrics.text().decode()
    running, waiting = (
        float(found[1]) if (found := re.search(rf"^trtqwen_gateway_{name} (\S+)$", text, re.MULTILINE)) else 0.0
        for name in ("in_flight", "queued")
    )
    return Json({"server_load": running + waiting, "running": running, "waiting": waiting})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The gateway's metrics for Prometheus; the engine's are at Triton's own endpoint."""
    fleet = fleet_of(request)
    fleet.metrics.set_supervision(read_supervision(fleet.config.supervisor))
    return Response(fleet.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Token ids of a prompt, or of a chat as the model reads it."""
    runtime = select(request, body)

    def answer() -> Json:
        ids, tokenizer = _ids(runtime, body), runtime.model.tokenizer
        strings = None
        if body.return_token_strs:
            strings = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
        content = {"count": len(ids), "max_model_len": runtime.model.limits.max_seq_len, "tokens": ids}
        return Json({**content, "token_strs": strings})

    return await work_out(request, body, answer)


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids."""
    tokenizer = select(request, body).model.tokenizer
    skip = bool(body.skip_special_tokens)
    text = await work_out(request, body, lambda: tokenizer.decode(body.tokens, skip_special_tokens=skip))
    return Json({"prompt": text, "text": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """What tokenizer_config.json says, chat template and special tokens among it."""
    path = _runtime(fleet_of(request), model).model.tokenizer.directory / "tokenizer_config.json"
    if not path.is_file():
        raise ApiError(404, "the model has no tokenizer_config.json", "no_tokenizer_config")
    return Json(json.loads(path.read_text(encoding="utf-8")))


def _ids(runtime: Runtime, body: TokenizeRequest) -> tuple[int, ...]:
    refuse_unsupported(body)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("send either a prompt or messages", param="prompt")
    if body.prompt is not None:
        raw = body.add_special_tokens is not False
        return runtime.model.encode(
            body.prompt, "prompt", raw=raw, most=_MOST_COUNTED * runtime.model.limits.max_seq_len
        )
    conversation = Conversation(
        runtime.model,
        runtime.template,
        runtime.config,
        body.messages or [],
        body.tools or [],
        add_generation_prompt=body.add_generation_prompt,
        continue_final=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
        documents=body.documents,
    )
    return conversation.ids()


def _runtime(fleet: Fleet, name: str | None) -> Runtime:
    route = fleet.route(name)
    if route is None:
        raise missing_model(str(name), fleet.names)
    return route.stable.runtime


def _model(fleet: Fleet, name: str) -> dict[str, Any]:
    model = _runtime(fleet, name).model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "trtqwen",
        "root": model.name,
        "parent": None,
        "max_model_len": model.limits.max_seq_len,
    }

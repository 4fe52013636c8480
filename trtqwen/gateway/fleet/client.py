"""The client of `trtqwen models`: read a gateway's table of models through its admin routes, and change an entry."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from trtqwen.diagnostics import InputError, ServerError, why_unreadable
from trtqwen.gateway.fleet.table import ModelEntry, Target, parse_entry

KEY = "TRTQWEN_ADMIN_KEY"
_SECONDS = 30.0  # for an answer that waits for nothing
_POLL_SECONDS = 0.2


def status_lines(status: dict[str, Any]) -> list[str]:
    """Format the result of `GET /admin/models` as text."""
    told = []
    for name, model in status["models"].items():
        told.append(f"{name}: {model['state']}")
        total = sum(target["weight"] for target in model["targets"]) or 1
        for target in model["targets"]:
            part = f"{100 * target['weight'] / total:.3g} %"
            share = f"shadow of {100 * target['shadow']:.3g} %" if target["shadow"] else part
            ready = "ready" if target["ready"] else "does not answer"
            place = f"{target['repository']} on {', '.join(target['triton'])}"
            told.append(f"  {target['name']} ({share}): {ready}, {target['requests']} requests; {place}")
    for engine in status["draining"]:
        told.append(f"draining: {', '.join(engine['triton'])}, {engine['requests']} requests")
    return told


def admin_key(file: Path | None) -> str:
    """The admin key from a file that holds nothing else, or from the environment.

    Raises:
        InputError: if there is none.
    """
    try:
        key = file.read_text(encoding="utf-8") if file is not None else os.environ.get(KEY, "")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(
            f"{file}: cannot be read ({why_unreadable(problem)})", "name a file that holds the key alone"
        ) from None
    if not (key := key.strip()):
        raise InputError("there is no admin key", f"set {KEY}, or name a file with --key-file")
    return key


class Admin:
    """A gateway's admin routes.

    Args:
        url: of the gateway, such as http://127.0.0.1:8080.

    Raises:
        ServerError: by every call, if the gateway does not answer or refuses the call.
    """

    def __init__(self, url: str, key: str) -> None:
        self._parts = urlsplit(url if "://" in url else f"http://{url}")
        self._key = key

    def status(self) -> dict[str, Any]:
        """Every model, as `GET /admin/models` tells it."""
        return self._call("GET", "/admin/models")

    def report(self) -> list[dict[str, Any]]:
        """Figures of every model's targets."""
        models: list[dict[str, Any]] = self._call("GET", "/admin/report")["models"]
        return models

    def change(self, name: str, edit: Callable[[ModelEntry | None], ModelEntry | None]) -> dict[str, Any]:
        """Change a model's entry; returns when new requests go where it says.

        Args:
            edit: makes the new entry from the present one; None is no model.

        Raises:
            InputError: if `edit` refuses.
        """
        status = self.status()
        known = status["models"].get(name)
        entry = edit(None if known is None else parse_entry(known["entry"], name))
        body = None if entry is None else entry.model_dump(mode="json", exclude_none=True)
        method = "DELETE" if entry is None else "PUT"
        path = f"/admin/models/{quote(name)}"
        return self._call(method, path, body, {"If-Match": status["revision"]}, seconds=None)

    def drained(self) -> None:
        """Wait until the last request on engines that no model uses has ended."""
        while not self.status()["settled"]:
            time.sleep(_POLL_SECONDS)

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        seconds: float | None = _SECONDS,
    ) -> dict[str, Any]:
        parts = self._parts
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        where = f"{parts.scheme}://{parts.netloc}"
        try:
            connection = kind(parts.hostname or "", parts.port, timeout=seconds)
            own = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json", **(headers or {})}
            content = None if body is None else json.dumps(body)
            connection.request(method, parts.path.rstrip("/") + path, content, own)
            response = connection.getresponse()
            text = response.read()
            connection.close()
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise ServerError(f"{where}: the gateway does not answer ({problem})", "check --url") from None
        try:
            answer: dict[str, Any] = json.loads(text)
        except ValueError:
            raise ServerError(f"{where}: status {response.status}, and no JSON", "check --url") from None
        if response.status == 404 and answer.get("error", {}).get("code") == "http_error":
            raise ServerError(f"{where}: has no admin routes", "start the gateway with --admin-keys")
        if response.status >= 400:
            message = answer.get("error", {}).get("message", answer)
            raise ServerError(f"{where}: {message}", _HINTS.get(response.status, ""))
        return answer


_HINTS = {401: f"check {KEY}", 412: "run the command again"}


def new_target(
    repository: Path,
    triton: list[str] | None = None,
    gpus: list[int] | None = None,
    name: str | None = None,
) -> Target:
    """Make a target from options; its default name is the repository's.

    Raises:
        InputError: naming the option that cannot be used.
    """
    place = repository.resolve()
    own = {"name": name or place.name, "repository": place, "triton": triton or None, "gpus": gpus or None}
    return parse_entry({"targets": [own]}, str(own["name"])).targets[0]


def replaced(entry: ModelEntry | None, target: Target) -> ModelEntry:
    """The model with this target alone; aliases and stickiness stay."""
    alone = target.model_copy(update={"weight": None, "shadow": None})
    return ModelEntry(targets=(alone,)) if entry is None else entry.model_copy(update={"targets": (alone,)})


def with_canary(entry: ModelEntry | None, target: Target | str, percent: float, model: str) -> ModelEntry:
    """The model with a share of its requests at another target; the stable one answers the rest.

    Args:
        target: a new one, or the name of one that the model has.

    Raises:
        InputError: if the model or the target does not exist, or the target is the stable one.
    """
    known = _known(entry, model)
    chosen = _chosen(known, target, model)
    stable = known.stable.model_copy(update={"weight": 100 - percent, "shadow": None})
    canary = chosen.model_copy(update={"weight": percent, "shadow": None})
    return _checked(known, (stable, canary, *_shadows(known, chosen)), model)


def with_shadow(entry: ModelEntry | None, target: Target | str, percent: float, model: str) -> ModelEntry:
    """The model with copies of a share of its requests at another target.

    Raises:
        InputError: as `with_canary` does.
    """
    known = _known(entry, model)
    chosen = _chosen(known, target, model)
    shadow = chosen.model_copy(update={"weight": None, "shadow": percent / 100})
    others = tuple(one for one in known.targets if one.name != chosen.name)
    return _checked(known, (*others, shadow), model)


def promoted(entry: ModelEntry | None, name: str | None, model: str) -> ModelEntry:
    """The model with a target that was tried as the only one.

    Args:
        name: None is the only one besides the stable target.

    Raises:
        InputError: if it is not clear which.
    """
    known = _known(entry, model)
    others = [target for target in known.targets if target.name != known.stable.name]
    chosen = [target for target in known.targets if target.name == name] if name is not None else others
    if len(chosen) != 1:
        names = ", ".join(target.name for target in others) or "none"
        what = f"{model}: it is not clear which target is to serve alone (besides {known.stable.name}: {names})"
        raise InputError(what, "name one with --name")
    return replaced(known, chosen[0])


def rolled_back(entry: ModelEntry | None, model: str) -> ModelEntry:
    """The model with its stable target alone."""
    known = _known(entry, model)
    return replaced(known, known.stable)


def _known(entry: ModelEntry | None, model: str) -> ModelEntry:
    if entry is None:
        raise InputError(f"the model {model!r} does not exist", "add it with `trtqwen models set`")
    return entry


def _chosen(entry: ModelEntry, target: Target | str, model: str) -> Target:
    name = target if isinstance(target, str) else target.name
    if name == entry.stable.name:
        raise InputError(f"{model}: {name} is the stable target's name", "give the other one its own with --name")
    if isinstance(target, Target):
        return target
    for known in entry.targets:
        if known.name == name:
            return known
    raise InputError(f"{model}: has no target {name}", "name its repository with --repo")


def _shadows(entry: ModelEntry, but: Target) -> tuple[Target, ...]:
    return tuple(target for target in entry.targets if target.shadow is not None and target.name != but.name)


def _checked(entry: ModelEntry, targets: tuple[Target, ...], model: str) -> ModelEntry:
    content = {**entry.model_dump(), "targets": [target.model_dump() for target in targets]}
    return parse_entry(content, model)


def target_or_name(
    repository: Path | None, triton: list[str] | None, gpus: list[int] | None, name: str | None
) -> Target | str:
    """A new target if there is a repository, else the name of one that the model has.

    Raises:
        InputError: if there is neither.
    """
    if repository is not None:
        return new_target(repository, triton, gpus, name)
    if name is None or triton or gpus:
        raise InputError("the target is not named", "give --repo for a new one, or --name for one that the model has")
    return name


def read_metrics(urls: list[str]) -> list[str]:
    """The metrics of gateways, as text.

    Raises:
        ServerError: if one does not answer.
    """
    texts = []
    for url in urls:
        address = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            with urllib.request.urlopen(f"{address}/metrics", timeout=_SECONDS) as answer:
                texts.append(answer.read().decode())
        except (OSError, ValueError) as problem:
            raise ServerError(f"{address}: the metrics cannot be read ({problem})", "check --url") from None
    return texts

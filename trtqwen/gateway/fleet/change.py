"""Changes of the table while clients are served: write it, wait until every process has switched, or undo it."""

from __future__ import annotations

import asyncio
import time

from trtqwen.diagnostics import InputError
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.fleet.fleet import Fleet
from trtqwen.gateway.fleet.table import ModelEntry, ModelTable, exclusively, read_table, revision, write_table

_POLL_SECONDS = 0.05
_SLACK_SECONDS = 30.0  # beyond the time that an engine may take to start


async def change_model(fleet: Fleet, name: str, entry: ModelEntry | None, expected: str | None = None) -> None:
    """Change the targets of a model. Returns when all new requests go there; running requests finish on the old ones.

    Args:
        entry: None removes the model.
        expected: the revision that the change was made from; None takes any.

    Raises:
        ApiError: 409 if the gateway has no table, cannot write it, or another change is under way; 412 if the table
            has another revision; 404 if the model to remove does not exist; 422 with the reason if a target cannot be
            used: then the table and the targets are unchanged.
    """
    path = fleet.config.models
    if path is None:
        raise _conflict("this gateway serves a single repository; start it with a table of models (--models)")
    try:
        with exclusively(path):
            before = read_table(path)
            if expected is not None and expected != revision(before):
                message = f"the table has changed since revision {expected}; read it again"
                raise ApiError(412, message, "revision_changed")
            if entry is None and name not in before.models:
                raise ApiError(404, f"the model {name!r} does not exist", "model_not_found")
            after = before.with_entry(name, entry)
            write_table(path, after)
            fleet.look()
            problem = await _switched(fleet, after, name)
            if problem:
                write_table(path, before)
                fleet.look()
                raise ApiError(422, f"{name} is served as before: {problem}", "model_not_changed")
    except BlockingIOError:
        raise _conflict("another change of the models is under way; try again when it is done") from None
    except OSError as problem:  # a table on a read-only file system
        raise _conflict(f"the table of models cannot be written ({problem.strerror}); change its file") from None
    except InputError as problem:
        raise ApiError(422, str(problem), "model_not_changed") from None


async def _switched(fleet: Fleet, table: ModelTable, name: str) -> str:
    """Wait until every process of the gateway has applied the table; return why one cannot, or None."""
    wanted = revision(table)
    deadline = time.monotonic() + fleet.config.engine_start_seconds + _SLACK_SECONDS
    while time.monotonic() < deadline:
        everybody = fleet.everybody()
        if problem := next((problem for one in everybody if (problem := one["problems"].get(name))), ""):
            return str(problem)
        if all(one["revision"] == wanted and one["switched"] for one in everybody):
            return ""
        await asyncio.sleep(_POLL_SECONDS)
    return "not every process of the gateway has switched in time"


def _conflict(message: str) -> ApiError:
    return ApiError(409, message, "models_not_changeable")

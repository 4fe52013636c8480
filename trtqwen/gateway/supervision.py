"""The state of the engines behind this gateway, from `trtqwen serve`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Supervision:
    """The supervisor's state.

    Attributes:
        state: `running`, or `restarting` while an engine is down and will come back.
        restarts: number of restarts.
        cause: cause of the last restart.
        engines: of a table of models, by `Target.place`: `triton` (addresses), `running`, `problem`.
    """

    state: str = "running"
    restarts: int = 0
    cause: str = ""
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_supervision(path: Path | None) -> Supervision:
    """Read the supervisor's file; without one, or before it is written, all runs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return Supervision(**content)
    except (OSError, ValueError, TypeError):
        return Supervision()

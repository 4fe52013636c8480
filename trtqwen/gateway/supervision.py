"""What `trtqwen serve` says about the engines behind this gateway."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Supervision:
    """What the supervisor does.

    Attributes:
        state: `running`, or `restarting` while an engine is down and will come back.
        restarts: how often something was started again.
        cause: why it last was.
    """

    state: str = "running"
    restarts: int = 0
    cause: str = ""


def read_supervision(path: Path | None) -> Supervision:
    """Read the supervisor's file; without one, or before it is written, all runs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return Supervision(**content)
    except (OSError, ValueError, TypeError):
        return Supervision()

"""The commit that a benchmark measures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """Return the commit that TRTQWEN_COMMIT names, for copies of a checkout, or this checkout's."""
    told = os.environ.get("TRTQWEN_COMMIT")
    if told:
        return told
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"

"""The user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """Return trtqwen's directory for one kind of content in the user's cache directory (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtqwen" / name

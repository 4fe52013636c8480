"""Where a user's programs keep what they can make again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """A directory of ours for one kind of content, in the user's cache directory; see the XDG base directories."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtqwen" / name

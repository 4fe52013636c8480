"""Facts about TensorRT-LLM's LLM API by release, read from `llmapi.json`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from trtqwen.facts.names import LlmApiRelease
from trtqwen.facts.releases import version

_FACTS = Path(__file__).with_name("llmapi.json")


@cache
def llm_arguments(release: LlmApiRelease) -> frozenset[str]:
    """The arguments that `LLM` takes in a release; it refuses others."""
    content = _content()
    return frozenset([*content["common"], *content["releases"][release]])


def llmapi_release(installed: str) -> LlmApiRelease:
    """Return the newest known release that is not newer than an installed version."""
    known: list[LlmApiRelease] = sorted(_content()["releases"], key=version)
    older = [name for name in known if version(name) <= version(installed)]
    return older[-1] if older else known[0]


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_FACTS.read_text(encoding="utf-8"))
    return content

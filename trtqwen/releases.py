"""Facts about TensorRT-LLM releases, read from `releases.json`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trtqwen.recipe import Release

_FACTS = Path(__file__).with_name("releases.json")


class ReleaseFacts(BaseModel):
    """What a release reads.

    Attributes:
        unknown_checkpoint_keys: keys of config.json, by section, that its reader refuses.
        uneven_pipeline: whether it keeps the layers that pp_size does not divide; otherwise it drops them silently.
        rope_scalings: types of rotary scaling it computes for Qwen2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unknown_checkpoint_keys: dict[str, list[str]]
    uneven_pipeline: bool
    rope_scalings: list[str]


@cache
def release_facts(release: Release) -> ReleaseFacts:
    """The facts of one release."""
    content = json.loads(_FACTS.read_text(encoding="utf-8"))
    return ReleaseFacts.model_validate(content["releases"][release])

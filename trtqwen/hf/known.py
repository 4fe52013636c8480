"""Sizes of the published Qwen2.5 models, from `models.json`, for estimates without a model directory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from trtqwen.hf.config import MODEL_TYPE, HfConfig

_FACTS = Path(__file__).with_name("models.json")


def model_names() -> tuple[str, ...]:
    """The names a recipe's `model` may have."""
    return tuple(_models())


def known_config(name: str) -> HfConfig:
    """The config of a published model, as its Instruct version ships it.

    Raises:
        KeyError: if it is not one of `model_names`.
    """
    common = {"model_type": MODEL_TYPE, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    return HfConfig.model_validate({**common, "torch_dtype": "bfloat16", **_models()[name]})


@cache
def _models() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = json.loads(_FACTS.read_text(encoding="utf-8"))["models"]
    return models

"""`config.json` of an engine directory: the checkpoint's config and the limits the engine was built with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from trtqwen.artifact.names import CONFIG
from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.diagnostics import InputError
from trtqwen.quantize.weight_only import Int8Layout
from trtqwen.recipe import LlmApiSettings, Positive, VllmSettings

Backend = Literal["tensorrt_llm", "torch", "vllm", "llmapi"]


class BuildConfig(BaseModel):
    """The limits of an engine, by TensorRT-LLM's names. All in tokens but `max_batch_size`, in requests."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    max_batch_size: Positive
    max_num_tokens: Positive
    max_seq_len: Positive
    tokens_per_block: Positive

    @model_validator(mode="before")
    @classmethod
    def _trtllm_build_nests(cls, data: Any) -> Any:
        plugins = data.get("plugin_config") if isinstance(data, dict) else None
        if isinstance(plugins, dict) and "tokens_per_block" in plugins:
            return {**data, "tokens_per_block": plugins["tokens_per_block"]}
        return data


class EngineConfig(BaseModel):
    """An engine directory's config.json; the two sections carry the names that trtllm-build gives them.

    Attributes:
        version: the TensorRT-LLM release that built it; None for a torch engine.
        vllm, llmapi: settings of these backends.
        int8_layout: INT8 layout of the rank files of a torch engine.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    backend: Backend = "tensorrt_llm"  # trtllm-build does not name itself
    version: str | None = None
    vllm: VllmSettings | None = None
    llmapi: LlmApiSettings | None = None
    int8_layout: Int8Layout | None = None
    pretrained_config: CheckpointConfig
    build_config: BuildConfig

    @property
    def starts_vllm(self) -> bool:
        """Return whether the engine needs a vLLM that trtqwen starts, unlike one at an address."""
        return self.backend == "vllm" and (self.vllm is None or self.vllm.address is None)


def read_engine_config(directory: Path) -> EngineConfig:
    """Read and check an engine's config.json.

    Raises:
        InputError: if it is missing or broken.
    """
    path = directory / CONFIG
    try:
        return EngineConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise InputError(f"{path}: is missing", "name an engine directory that `trtqwen build` wrote") from None
    except (ValidationError, ValueError):
        raise InputError(f"{path}: is not the config of a trtqwen engine", "build the engine again") from None

"""The fields of a Hugging Face Qwen2 `config.json` that conversion needs, with the defaults of NVIDIA's converter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtqwen.diagnostics import SourceError, first_problem
from trtqwen.layout import CONFIG

ARCHITECTURE = "Qwen2ForCausalLM"
TRAINED_CONTEXT = 32768  # tokens; Qwen2.5 reads more only by YaRN, whatever max_position_embeddings says
Size = Annotated[int, Field(gt=0, le=1 << 24)]  # a larger one is a slip, and would take all memory


class HfConfig(BaseModel):
    """Shape and constants of a dense Qwen2 or Qwen2.5 model. Sizes in elements."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architectures: list[str]
    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(gt=0, le=1024)
    num_attention_heads: Size
    num_key_value_heads: Size
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: float = Field(gt=0)
    hidden_act: str = "silu"
    head_dim: Size | None = None
    rope_theta: float = 100000.0  # the Qwen converter's default, not transformers' 10000
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    torch_dtype: str | None = None
    seq_length: int = 8192

    @model_validator(mode="before")
    @classmethod
    def _newer_spellings(cls, data: dict[str, Any]) -> dict[str, Any]:
        data = dict(data)
        data.setdefault("num_key_value_heads", data.get("num_attention_heads"))
        if data.get("dtype") is not None:  # transformers >= 4.56 writes `dtype`
            data["torch_dtype"] = data["dtype"]
        rope = data.get("rope_parameters")  # transformers >= 5 joins rope_theta and rope_scaling
        if isinstance(rope, dict):
            data.setdefault("rope_theta", rope.get("rope_theta"))
            if rope.get("rope_type", "default") != "default":
                data["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaling = data.get("rope_scaling")
        if isinstance(scaling, dict) and "type" in scaling:  # as transformers presents it
            data["rope_scaling"] = {"rope_type": scaling["type"], **scaling}
        return data

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


def stretched(config: HfConfig, factor: float) -> HfConfig:
    """The config with its context stretched by YaRN, as Qwen's model cards advise for long texts.

    max_position_embeddings becomes the whole stretched context: TensorRT-LLM makes its rotary table that long.

    Raises:
        SourceError: if the model has a rotary scaling already.
    """
    if config.rope_scaling is not None:
        raise SourceError(
            f"yarn_factor {factor:g}: the model's config.json has a rope_scaling of its own", "leave yarn_factor out"
        )
    original = min(config.max_position_embeddings, TRAINED_CONTEXT)
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "type": "yarn"}
    return config.model_copy(
        update={"rope_scaling": scaling, "max_position_embeddings": math.floor(original * factor)}
    )


def load_config(directory: Path) -> HfConfig:
    """Read and check `config.json`.

    Raises:
        SourceError: if the file is missing or broken, or the model is not a dense, unquantised Qwen2.
    """
    path = directory / CONFIG
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory", "name a Hugging Face model directory")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise SourceError(f"{directory}: has no config.json", "name the directory of a Hugging Face model") from None
    except ValueError as problem:
        raise SourceError(f"{path}: is not JSON ({problem})", "download the file again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path}: is not a JSON object", "download the file again")
    architectures = data.get("architectures")
    if architectures != [ARCHITECTURE]:
        found = ", ".join(map(str, architectures)) if isinstance(architectures, list) else architectures
        raise SourceError(
            f"{path}: architectures is {found or 'none'}",
            f"trtqwen converts {ARCHITECTURE} (dense Qwen2 and Qwen2.5)",
        )
    if quantization := data.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise SourceError(
            f"{path}: the weights are quantised already (quant_method {method})", "use the 16-bit original"
        )
    if data.get("use_sliding_window"):
        raise SourceError(
            f"{path}: use_sliding_window is true, which TensorRT-LLM's Qwen2 does not carry out", "set it to false"
        )
    try:
        return HfConfig.model_validate(data)
    except ValidationError as problem:
        raise SourceError(f"{path}: {first_problem(problem)}", "fix the file") from None

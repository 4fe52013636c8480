"""The `config.json` of a Hugging Face Qwen2 model, read as transformers reads it.

Every key is computed, known to change nothing (`config_keys.json`), or refused by name. An unknown key becomes
a finding. A null counts as an absent key.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtqwen.artifact.names import CONFIG
from trtqwen.diagnostics import Diagnostic, SourceError, first_problem
from trtqwen.hf import rope
from trtqwen.hf.directory import check_directory
from trtqwen.hf.files import read_json, shown, token_ids

ARCHITECTURE = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"
HfDtype = Literal["float16", "bfloat16", "float32"]
Size = Annotated[int, Field(gt=0, le=1 << 24)]  # a larger one is a slip, and would take all memory
_KEYS = Path(__file__).with_name("config_keys.json")
_SILU = ("silu", "swish")
_DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}  # transformers' for Qwen2
_WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_CHECKED_KEYS = {
    "dtype",
    "torch_dtype",
    "auto_map",
    "quantization_config",
    "dual_chunk_attention_config",
    "sparse_attention_config",
    "original_max_position_embeddings",
    *rope.KEYS,
    *_WINDOW_KEYS,
}


class HfConfig(BaseModel):
    """Shape and constants of a dense Qwen2 or Qwen2.5 model. Sizes in elements.

    Attributes:
        max_position_embeddings: tokens that the rotary table covers; with YaRN, those that it stretches to.
        rope_scaling: with both spellings of its type; None for plain rotations.
        torch_dtype: of the weights; None where neither config.json nor the files tell.
        dense_context: tokens up to which dual chunk attention is ordinary attention; None without it.
        eos_token_ids: what config.json names as end of an answer.
        findings: defaults that apply, and unknown keys.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(gt=0, le=1024)
    num_attention_heads: Size
    num_key_value_heads: Size
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: float = Field(gt=0, allow_inf_nan=False)
    hidden_act: str = "silu"
    head_dim: Size | None = None
    rope_theta: float = rope.DEFAULT_THETA
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    torch_dtype: HfDtype | None = None
    seq_length: int = 8192
    dense_context: Size | None = None
    eos_token_ids: tuple[int, ...] = Field(default=(), strict=False)
    findings: tuple[Diagnostic, ...] = Field(default=(), repr=False, strict=False)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def native_context(self) -> int:
        """Context length without YaRN."""
        if self.rope_scaling is not None and self.rope_scaling["type"] == "yarn":
            return int(self.rope_scaling["original_max_position_embeddings"])
        return self.context

    @property
    def context(self) -> int:
        """Context length as configured."""
        return min(self.max_position_embeddings, self.dense_context or self.max_position_embeddings)


def stretched(config: HfConfig, factor: float) -> HfConfig:
    """The config with its context stretched by YaRN, as Qwen's model cards advise for long texts.

    max_position_embeddings becomes the whole stretched context: TensorRT-LLM makes its rotary table that long.

    Raises:
        SourceError: if the model has another rotary scaling already.
    """
    own = config.rope_scaling
    if own is not None:
        if own["type"] == "yarn" and own["factor"] == factor:
            return config
        raise SourceError(
            f"yarn_factor {factor:g}: config.json has a rope_scaling of its own ({own['type']}, factor "
            f"{own['factor']:g}), which reaches max_position_embeddings {config.max_position_embeddings}",
            "leave yarn_factor out, or remove rope_scaling from config.json",
        )
    original = config.context
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "type": "yarn"}
    return config.model_copy(
        update={
            "rope_scaling": scaling,
            "max_position_embeddings": math.floor(original * factor),
            "dense_context": None,
        }
    )


def load_config(directory: Path, *, quantized: bool = False) -> HfConfig:
    """Read and check `config.json`.

    Args:
        quantized: take a model whose weights are quantized too.

    Raises:
        SourceError: if the directory is something else than a dense Qwen2, or a field of the file cannot be computed.
    """
    check_directory(directory)
    path = directory / CONFIG
    raw = read_json(path)
    data = {key: value for key, value in raw.items() if value is not None}
    _check_family(data, path)
    if not quantized:
        _check_quantization(data, path)
    absent = _defaults(data, path)
    rotary = rope.read_rope(data, path)
    findings = [*absent, *rotary.findings, *_check_keys(data, path)]
    _check_window(raw, path)
    if data.get("hidden_act", "silu") not in _SILU:
        raise SourceError(
            f"{path}: hidden_act is {shown(data['hidden_act'])}",
            "use a model with silu, as every published Qwen2 has",
        )
    dense, said = _dense_context(data, path)
    if raw.get("num_key_value_heads", 0) is None:
        data["num_key_value_heads"] = data.get("num_attention_heads")  # as transformers takes a null
    fields = data | {
        "rope_theta": rotary.theta,
        "rope_scaling": rotary.scaling,
        "max_position_embeddings": _positions(data, rotary),
        "hidden_act": "silu",
        "torch_dtype": _dtype(data, path),
        "dense_context": dense,
        "eos_token_ids": token_ids(raw.get("eos_token_id"), "eos_token_id", path),
        "findings": (*findings, *said),
    }
    try:
        config = HfConfig.model_validate(fields)
    except ValidationError as problem:
        raise SourceError(f"{path}: {first_problem(problem)}", "fix the file") from None
    if config.head_size % 2:
        raise SourceError(f"{path}: a head has {config.head_size} elements, an odd number", "correct head_dim")
    return config


def _check_family(data: dict[str, Any], path: Path) -> None:
    if "architecture" in data and "mapping" in data:
        raise SourceError(
            f"{path}: is that of a TensorRT-LLM checkpoint", "name the Hugging Face model that it was made from"
        )
    architectures = data.get("architectures", [ARCHITECTURE])
    if architectures != [ARCHITECTURE]:
        found = ", ".join(map(str, architectures)) if isinstance(architectures, list) else shown(architectures)
        raise SourceError(
            f"{path}: architectures is {found or 'none'}",
            f"use a model of {ARCHITECTURE} (dense Qwen2 or Qwen2.5)",
        )
    if data.get("model_type") != MODEL_TYPE:
        raise SourceError(
            f"{path}: model_type is {shown(data.get('model_type'))}, not {MODEL_TYPE}",
            "use a dense Qwen2 or Qwen2.5; MoE, VL and Qwen1 models are built otherwise",
        )


def _check_quantization(data: dict[str, Any], path: Path) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if quantization := data.get(key):
            method = key
            if isinstance(quantization, dict):
                method = quantization.get("quant_method") or ("mlx" if key == "quantization" else "unknown")
            elif isinstance(quantization, str):
                method = quantization
            raise SourceError(
                f"{path}: the weights are quantized already (quant_method {method})", "use the 16-bit original"
            )


def _defaults(data: dict[str, Any], path: Path) -> list[Diagnostic]:
    """Add transformers' defaults for absent constants."""
    absent = {name: value for name, value in _DEFAULTS.items() if name not in data}
    data |= absent
    return [
        Diagnostic(
            f"{path}: has no {name}: {value:g} is used, as transformers does",
            "add the model's own to the file",
            "warning",
            "config",
        )
        for name, value in absent.items()
    ]


def _check_keys(data: dict[str, Any], path: Path) -> list[Diagnostic]:
    """Refuse keys that change the computation, and name unknown keys."""
    facts = _facts()
    inert = {key for keys in facts["inert"].values() for key in keys}
    unknown = []
    for key, value in data.items():
        if key in inert or key in _CHECKED_KEYS or key in HfConfig.model_fields:
            continue
        if key in facts["inert_if"]:
            if value not in facts["inert_if"][key]:
                why = facts["why_not"].get(key, "TensorRT-LLM's Qwen2 does not compute it")
                raise SourceError(f"{path}: {key} is {shown(value)}: {why}", "use a model without it")
            continue
        unknown.append(key)
    findings = []
    if unknown:
        names = ", ".join(f"{key} {shown(data[key])}" for key in unknown)
        findings.append(
            Diagnostic(
                f"{path}: trtqwen does not know {names}; transformers' Qwen2 does not read "
                f"{'it' if len(unknown) == 1 else 'them'} either",
                "check that the model needs no code of its own for it",
                "warning",
                "config",
            )
        )
    if data.get("auto_map"):
        findings.append(
            Diagnostic(
                f"{path}: auto_map names code of the model's own ({shown(data['auto_map'])}), which is not run",
                "check that it computes what Qwen2 computes",
                "warning",
                "config",
            )
        )
    return findings


def _check_window(raw: dict[str, Any], path: Path) -> None:
    """Refuse a sliding window that has an effect: TensorRT-LLM's Qwen2 attends to the whole context.

    Args:
        raw: config.json with its nulls: a null is no window, an absent one 4,096 tokens.
    """
    layers, types = raw.get("num_hidden_layers"), raw.get("layer_types")
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    if types is None:
        first = raw.get("max_window_layers", 28)
        slide = window is not None and isinstance(layers, int) and isinstance(first, int) and first < layers
        sliding = layers - first if slide and isinstance(layers, int) else 0
    else:
        if not isinstance(types, list) or len(types) != layers:
            count = len(types) if isinstance(types, list) else shown(types)
            raise SourceError(
                f"{path}: layer_types lists {count} layers, num_hidden_layers is {layers}",
                "correct layer_types; transformers refuses it too",
            )
        if others := sorted({shown(kind) for kind in types} - {'"full_attention"', '"sliding_attention"'}):
            raise SourceError(
                f"{path}: layer_types has {', '.join(others)}", "use a model with full attention in every layer"
            )
        sliding = types.count("sliding_attention")
    if not sliding:
        return
    if window is None:
        raise SourceError(
            f"{path}: layer_types has sliding_attention, but there is no sliding window (use_sliding_window is "
            f"{shown(raw.get('use_sliding_window', False))})",
            "list full_attention for every layer, if the model was trained so",
        )
    if isinstance(positions := raw.get("max_position_embeddings"), int) and positions <= window:
        return  # no context reaches beyond the window
    raise SourceError(
        f"{path}: {sliding} of {layers} layers attend through a sliding window of {shown(window)} tokens "
        "(use_sliding_window), which TensorRT-LLM's Qwen2 does not compute",
        f"keep contexts within the window: set max_position_embeddings to {shown(window)} in a copy of config.json",
    )


def _dense_context(data: dict[str, Any], path: Path) -> tuple[int | None, list[Diagnostic]]:
    """Return the context in which dual chunk attention (An et al. 2024) equals ordinary attention: one chunk."""
    chunked = data.get("dual_chunk_attention_config")
    if not chunked:
        if data.get("sparse_attention_config"):
            raise SourceError(
                f"{path}: sparse_attention_config without dual_chunk_attention_config", "use a model without it"
            )
        return None, []
    sizes = [
        value
        for name in ("chunk_size", "original_max_position_embeddings")
        if isinstance(chunked, dict) and isinstance(value := chunked.get(name), int) and value > 0
    ]
    if not sizes:
        raise SourceError(
            f"{path}: dual_chunk_attention_config has no chunk_size", "add it, as the model's card has it"
        )
    context = min(sizes)
    if data.get("max_position_embeddings", 0) <= context:
        return None, []
    return context, [
        Diagnostic(
            f"{path}: dual_chunk_attention_config acts beyond {context:,} tokens, and is not computed: the context "
            "ends there",
            f"keep engine.max_seq_len within {context:,}",
            "note",
            "config",
        )
    ]


def _positions(data: dict[str, Any], rotary: rope.Rope) -> Any:
    """Return max_position_embeddings, or YaRN's context if it is longer (model cards do not change the key)."""
    positions = data.get("max_position_embeddings")
    if rotary.context is not None and isinstance(positions, int):
        return max(positions, rotary.context)
    return positions


def _dtype(data: dict[str, Any], path: Path) -> str | None:
    """`dtype` (transformers 4.56 and later) or `torch_dtype`; None for float64 and where neither is named."""
    said = {key: str(data[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in data}
    if len(set(said.values())) > 1:
        raise SourceError(
            f"{path}: dtype is {said['dtype']} and torch_dtype {said['torch_dtype']}; transformers takes dtype",
            "remove torch_dtype",
        )
    names = {"half": "float16", "float": "float32", "auto": None, "float64": "float32", "double": "float32"}
    for key, name in said.items():
        name = names.get(name, name) or ""
        if name and name not in ("float16", "bfloat16", "float32"):
            raise SourceError(f"{path}: {key} is {name}", "use the 16-bit original")
        return name or None
    return None


@cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(_KEYS.read_text(encoding="utf-8"))
    return facts

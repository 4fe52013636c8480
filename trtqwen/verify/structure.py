"""The required names, shapes and dtypes of a checkpoint's tensors, from its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from trtqwen.artifact.manifest import MANIFEST, read_manifest
from trtqwen.artifact.names import CONFIG
from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.checkpoint.convert import ConversionPlan
from trtqwen.diagnostics import CheckpointError
from trtqwen.hf.config import HfConfig
from trtqwen.quantize.smoothquant import SmoothQuantMode
from trtqwen.recipe import CheckpointRecipe, Int8LayoutChoice, override
from trtqwen.safetensors_io.format import TensorSpec
from trtqwen.safetensors_io.reader import SafetensorsReader

# Tables that NVIDIA's converter writes and TensorRT-LLM does not need.
OPTIONAL = {"embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq"}
_SMOOTHQUANT = {
    mode.quant_algo: mode for mode in (SmoothQuantMode(a, b) for a in (False, True) for b in (False, True))
}
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_size",
    "hidden_act": "hidden_act",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "rotary_scaling": "rope_scaling",
}


def stored_layout(directory: Path, int8_layout: Int8LayoutChoice | None) -> Int8LayoutChoice:
    """Return the INT8 layout: the given one, or the manifest's; `plain` if nothing is INT8 weight-only.

    Raises:
        CheckpointError: if the checkpoint has such matrices, no manifest, and the layout was not given.
    """
    if int8_layout is not None:
        return int8_layout
    if (directory / MANIFEST).is_file():
        recorded: Int8LayoutChoice = read_manifest(directory, "checkpoint").parameters["int8_layout"]
        return recorded
    content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    if content["quantization"]["quant_algo"] == "W8A16":
        reader = SafetensorsReader(directory / "rank0.safetensors", CheckpointError)
        if any(reader.spec(name).dtype.name == "int8" for name in reader):
            raise CheckpointError(
                f"{directory}: has no manifest that tells the layout of its INT8 weights",
                "pass --int8-layout sm80 (Ampere, Ada) or sm90 (Hopper)",
            )
    return "plain"


def implied_recipe(config: CheckpointConfig, int8_layout: Int8LayoutChoice, hf: HfConfig) -> CheckpointRecipe:
    """The settings whose conversion of a model would give a checkpoint with this config.json.

    Raises:
        CheckpointError: if its precision is not one that trtqwen knows.
    """
    algo, scaling = config.quantization.quant_algo, config.rotary_scaling
    changes: dict[str, object] = {
        "dtype": config.dtype,
        "tp_size": config.mapping.tp_size,
        "pp_size": config.mapping.pp_size,
        "kv_cache": "int8" if config.quantization.kv_cache_quant_algo == "INT8" else "auto",
    }
    if scaling and scaling.get("type") == "yarn" and hf.rope_scaling is None:
        changes["yarn_factor"] = scaling.get("factor")
    if config.use_parallel_embedding:
        changes["embedding_sharding"] = "hidden" if config.embedding_sharding_dim == 1 else "vocab"
    if algo == "W8A16":
        changes |= {"quant": "int8_wo", "int8_layout": int8_layout}
    elif algo in _SMOOTHQUANT:
        mode = _SMOOTHQUANT[algo]
        changes |= {"quant": "int8_sq", "per_channel": mode.per_channel, "per_token": mode.per_token}
    elif algo is not None:
        raise CheckpointError(f"quantization.quant_algo {algo}: trtqwen verifies float, W8A16 and SmoothQuant only")
    return override(CheckpointRecipe(), changes)


def config_problems(config: CheckpointConfig, hf: HfConfig) -> list[str]:
    """Fields of the checkpoint's config.json that are not the model's, one sentence each."""
    return [
        f"config.json says {ours} {getattr(config, ours)}, but the model has {getattr(hf, theirs)}"
        for ours, theirs in _SAME.items()
        if getattr(config, ours) != getattr(hf, theirs)
    ]


def tensor_problems(plan: ConversionPlan, readers: Sequence[SafetensorsReader]) -> list[str]:
    """Tensors that are missing, unexpected, or of another shape or dtype, one sentence each."""
    return [
        f"{reader.path.name}: tensor {name!r} {problem}"
        for reader, expected in zip(readers, plan.ranks, strict=True)
        for name, problem in _file_problems(reader, expected).items()
    ]


def _file_problems(reader: SafetensorsReader, expected: Mapping[str, TensorSpec]) -> dict[str, str]:
    problems = {name: "is missing" for name in expected if name not in reader}
    problems |= {name: "is not expected" for name in reader if name not in expected and name not in OPTIONAL}
    for name in set(expected) - set(problems):
        found, due = reader.spec(name), expected[name]
        if found != due:
            problems[name] = f"is {found.dtype} {list(found.shape)}, where {due.dtype} {list(due.shape)} is expected"
    return dict(sorted(problems.items()))

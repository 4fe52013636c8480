"""Writes a TensorRT-LLM checkpoint as a Hugging Face directory: floats exactly, INT8 as compressed-tensors.

The export keeps the checkpoint's values: float tensors bit for bit in the checkpoint's dtype, and INT8 codes and
scales unchanged. Three things have no counterpart and become notes: an INT8 KV cache, the smoother of
`attention.dense` if query heads share a KV head, and separate scales for parts of a row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from trtqwen.artifact.directory import finished_directory
from trtqwen.artifact.names import CONFIG, TOKENIZER_DIRECTORY
from trtqwen.checkpoint.rule import linear_layers
from trtqwen.checkpoint.sharding import Split
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.export.gather import Checkpoint
from trtqwen.export.int8 import (
    dequantized,
    group_scales,
    group_size,
    one_scale,
    packed,
    quantization_config,
    shared_smoother,
)
from trtqwen.hf.config import ARCHITECTURE, HfConfig
from trtqwen.hf.rope import attention_ratio
from trtqwen.hf.tokenizer_files import TOKENIZER_FILES
from trtqwen.hf.weights import INDEX
from trtqwen.safetensors_io.format import Array, TensorSpec
from trtqwen.safetensors_io.writer import SafetensorsWriter

Activations = Literal["16bit", "int8"]
Progress = Callable[[int], None]
_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_TO_INT = {
    "attention.qkv": "input_layernorm.scale_to_int",
    "attention.dense": "attention.quantization_scaling_factor",
    "mlp.fc": "post_layernorm.scale_to_int",
    "mlp.gate": "post_layernorm.scale_to_int",
    "mlp.proj": "mlp.quantization_scaling_factor",
}
SHARD_BYTES = 5_000_000_000  # transformers' own limit


@dataclass(frozen=True)
class ExportPlan:
    """The plan of an export.

    Attributes:
        activations: how a weight-only checkpoint's inputs are to be computed.
        specs: every tensor, in the order of the files.
        config: config.json.
        notes: differences from the checkpoint, and their cost.
    """

    checkpoint: Checkpoint
    activations: Activations
    tied: bool
    specs: Mapping[str, TensorSpec]
    config: dict[str, Any]
    notes: tuple[Diagnostic, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def plan_export(directory: Path, activations: Activations = "16bit", *, plain: bool = False) -> ExportPlan:
    """Read the checkpoint's headers and plan every tensor of the result.

    Args:
        activations: for INT8 weight-only: `16bit` keeps W8A16, `int8` writes W8A8 with a scale for each token, which
            vLLM runs on CPUs too. SmoothQuant is W8A8 anyway.
        plain: leave the 16-bit weights of an INT8 weight-only checkpoint in INT8 layout `plain` as they are, for
            engines that quantize them when they load.

    Raises:
        CheckpointError: if it is not a whole checkpoint, or its precision has no export.
        InputError: if the activations do not go with the checkpoint.
    """
    checkpoint = Checkpoint(directory)
    if plain and checkpoint.algo == "W8A16":
        checkpoint.algo = ""
    if activations == "int8" and checkpoint.algo != "W8A16":
        raise InputError(
            f"{directory}: is not INT8 weight-only, so its activations cannot be chosen", "leave out --activations"
        )
    writer = _LayerWriter(checkpoint, activations)
    tied = checkpoint.tied()
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in writer.layer(0)}
    table = TensorSpec((checkpoint.config.vocab_size, checkpoint.config.hidden_size), writer.dtype)
    plan: dict[str, TensorSpec] = {"model.embed_tokens.weight": table}
    for layer in range(checkpoint.config.num_hidden_layers):
        plan |= {name.replace(".0.", f".{layer}.", 1): spec for name, spec in specs.items()}
    plan["model.norm.weight"] = TensorSpec((checkpoint.config.hidden_size,), writer.dtype)
    if not tied:
        plan["lm_head.weight"] = table
    return ExportPlan(checkpoint, activations, tied, plan, _config(checkpoint, writer, tied), writer.notes())


def run_export(
    plan: ExportPlan,
    output: Path,
    *,
    tokenizer: Path | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda count: None,
) -> list[Diagnostic]:
    """Write the directory; returns notes, the plan's among them.

    Args:
        tokenizer: directory with the tokenizer's files; None takes the checkpoint's own.
        shard_bytes: no weights file is larger, unless one tensor is.
        progress: called with the bytes written since the last call.

    Raises:
        OutputError: if `output` exists and `force` is not set.
    """
    with finished_directory(output, force=force, sources=[plan.checkpoint.directory]) as directory:
        write_model(plan, directory, shard_bytes=shard_bytes, progress=progress)
        copied = copy_tokenizer(tokenizer or plan.checkpoint.directory / TOKENIZER_DIRECTORY, directory)
    missing = Diagnostic(
        f"{plan.checkpoint.directory}: has no tokenizer",
        "copy the model's tokenizer files into the result",
        "warning",
    )
    return [*plan.notes, *([] if copied else [missing])]


def write_model(
    plan: ExportPlan,
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda count: None,
) -> None:
    """Write config.json and the weights into an empty directory."""
    shards = _shards(plan.specs, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    tensors = _tensors(plan)
    for name, shard in zip(names, shards, strict=True):
        with SafetensorsWriter(directory / name, shard, {"format": "pt"}) as writer:
            for key in shard:
                got, tensor = next(tensors)
                assert got == key, (got, key)
                writer.write(key, [tensor])
                progress(tensor.nbytes)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (directory / CONFIG).write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path) -> list[str]:
    """Copy the tokenizer's files; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, directory / name)
    return names


class _LayerWriter:
    """Makes the tensors of a layer by their Hugging Face names."""

    def __init__(self, checkpoint: Checkpoint, activations: Activations) -> None:
        config = checkpoint.config
        self._checkpoint = checkpoint
        self.int8_inputs = checkpoint.smooth or activations == "int8"
        self.dtype = _DTYPES[config.dtype]
        self._linears = linear_layers(_hf_config(checkpoint))
        self._ranks = config.mapping.tp_size
        self.groups: dict[int, list[str]] = {}
        self.ignored: list[str] = [] if checkpoint.algo == "" else ["lm_head"]
        self._requantized = False

    def layer(self, layer: int) -> Iterator[tuple[str, Array]]:
        """Names and tensors of a layer."""
        checkpoint, prefix = self._checkpoint, f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", checkpoint.norm(layer, "input_layernorm")
        if checkpoint.smooth:
            yield from self._smooth(layer, prefix)
        else:
            for linear in self._linears:
                for module, tensors in zip(
                    linear.modules, self._plain(layer, linear.name, linear.split), strict=True
                ):
                    yield from _named(f"{prefix}.{module}", tensors)
        for module, bias in zip(self._linears[0].modules, checkpoint.biases(layer), strict=True):
            yield f"{prefix}.{module}.bias", bias
        yield f"{prefix}.post_attention_layernorm.weight", checkpoint.norm(layer, "post_layernorm")

    def notes(self) -> tuple[Diagnostic, ...]:
        """Return the differences from the checkpoint; call it after the layers were made."""
        config, notes = self._checkpoint.config, []
        if config.quantization.kv_cache_quant_algo == "INT8":
            what = "the scales of the INT8 KV cache are left out: vLLM has no such cache"
            notes.append(Diagnostic(what, "expect the KV cache to take twice the memory", "note", "kv-cache"))
        if self._checkpoint.smooth and "re:.*o_proj$" in self.ignored:
            extra = config.hidden_size * config.num_attention_heads * config.head_size * config.num_hidden_layers
            what = (
                "o_proj is written in 16 bits: query heads that share a KV head have different smoothers, which no "
                "other tensor can take in"
            )
            cost = f"expect {extra / 2**20:,.0f} MiB more than in INT8; the answers do not get worse"
            notes.append(Diagnostic(what, cost, "note", "smoother"))
        if self._requantized:
            what = f"o_proj and down_proj are rounded a second time: each of {self._ranks} ranks had steps of its own"
            notes.append(Diagnostic(what, "convert with tp 1 to avoid it", "note", "requantized"))
        return tuple(notes)

    def _plain(self, layer: int, name: str, split: Split) -> list[dict[str, Array]]:
        """The tensors of each module of a float or INT8 weight-only layer."""
        if self._checkpoint.algo == "":
            return [{"weight": weight} for weight in self._checkpoint.floats(layer, name, split)]
        pairs = self._checkpoint.weight_only(layer, name, split)
        return [self._weight_only(name, codes, steps) for codes, steps in pairs]

    def _weight_only(self, name: str, codes: Array, steps: Array) -> dict[str, Array]:
        columns, part = codes.shape[1], self._part(name, codes.shape[1])
        if self.int8_inputs:
            self._requantized |= steps.shape[1] > 1
            codes, scale = one_scale(codes, steps, part)
            return {"weight": codes, "weight_scale": scale[:, None]}
        if steps.shape[1] > 1:
            size = group_size(columns, part)
            module = "re:.*o_proj$" if name == "attention.dense" else "re:.*down_proj$"
            if size is None:
                raise InputError(
                    f"{self._checkpoint.directory}: {name} has steps for each of {self._ranks} ranks, and no group "
                    f"size divides its {part} columns for each rank",
                    "convert with tp 1 first, or pass --activations int8",
                )
            if module not in self.groups.setdefault(size, []):
                self.groups[size].append(module)
            steps = group_scales(steps, columns, part, size)
        shape = np.array(codes.shape, np.int64)
        return {"weight_packed": packed(codes), "weight_scale": steps.astype(self.dtype), "weight_shape": shape}

    def _part(self, name: str, columns: int) -> int:
        """Columns of one rank of a row-parallel matrix, padding included."""
        if name == "mlp.proj":
            tile = 64 * self._ranks
            return -(-columns // tile) * 64
        return columns // self._ranks

    def _smooth(self, layer: int, prefix: str) -> Iterator[tuple[str, Array]]:
        """SmoothQuant. Smoothers are folded into the scales of the matrix before: of `mlp.proj` into up_proj's, of
        `attention.dense` into v_proj's where heads allow it.
        """
        checkpoint, config = self._checkpoint, self._checkpoint.config
        made = {
            linear.name: checkpoint.smoothquant(layer, linear.name, linear.split, _TO_INT[linear.name])
            for linear in self._linears
        }
        (dense, dense_scales), (_, proj_scales) = made["attention.dense"][0], made["mlp.proj"][0]
        assert dense_scales.smoother is not None
        assert proj_scales.smoother is not None
        shared = shared_smoother(
            dense_scales.smoother, config.num_attention_heads, config.num_key_value_heads, config.head_size
        )
        divisors: dict[str, Array] = {"mlp.up_proj": proj_scales.smoother}
        if shared is not None:
            divisors["self_attn.v_proj"] = shared
        elif "re:.*o_proj$" not in self.ignored:
            self.ignored.append("re:.*o_proj$")
        for linear in self._linears:
            for module, (codes, scales) in zip(linear.modules, made[linear.name], strict=True):
                if linear.name == "attention.dense" and shared is None:
                    weight = dequantized(dense, dense_scales.weight, dense_scales.smoother, self.dtype)
                    yield f"{prefix}.{module}.weight", weight
                    continue
                divisor = divisors.get(module)
                scale = scales.weight if divisor is None else scales.weight / divisor
                tensors = {"weight": codes, "weight_scale": scale.astype(np.float32)[:, None]}
                if scales.input is not None:
                    tensors["input_scale"] = np.array([scales.input], np.float32)
                yield from _named(f"{prefix}.{module}", tensors)


def _named(module: str, tensors: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for name, tensor in tensors.items():
        yield f"{module}.{name}", tensor


def _tensors(plan: ExportPlan) -> Iterator[tuple[str, Array]]:
    """Every tensor in the plan's order."""
    checkpoint, writer = plan.checkpoint, _LayerWriter(plan.checkpoint, plan.activations)
    yield "model.embed_tokens.weight", checkpoint.embedding()
    for layer in range(checkpoint.config.num_hidden_layers):
        yield from writer.layer(layer)
        checkpoint.release(layer)
    yield "model.norm.weight", checkpoint.norm(None)
    if not plan.tied:
        yield "lm_head.weight", checkpoint.lm_head()


def _shards(specs: Mapping[str, TensorSpec], limit: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _hf_config(checkpoint: Checkpoint) -> HfConfig:
    config = checkpoint.config
    return HfConfig(
        model_type="qwen2",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_epsilon,
        head_dim=config.head_size,
    )


def _rope_scaling(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """A checkpoint's rotary scaling as transformers reads it: it takes no mscale without mscale_all_dim."""
    if scaling is None or "mscale" not in scaling:
        return scaling
    fields = dict(scaling)
    factor, scales = float(fields["factor"]), (fields.pop("mscale"), fields.pop("mscale_all_dim"))
    return fields | {"attention_factor": attention_ratio(factor, *scales)}


def _config(checkpoint: Checkpoint, writer: _LayerWriter, tied: bool) -> dict[str, Any]:
    config = checkpoint.config
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2",
        "torch_dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": _rope_scaling(config.rotary_scaling),
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if config.head_size * config.num_attention_heads != config.hidden_size:
        content["head_dim"] = config.head_size
    if checkpoint.algo:
        content["quantization_config"] = quantization_config(
            activations=writer.int8_inputs,
            static=checkpoint.static,
            ignore=writer.ignored,
            groups=writer.groups,
        )
    return content

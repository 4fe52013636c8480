"""How each tensor of a Qwen2 checkpoint is made from Hugging Face tensors and split over the ranks.

Pure data: a list of `TensorRule`, in the order of the rank files. Names and splits follow NVIDIA's Qwen2 converter;
note that TensorRT-LLM's `mlp.fc` is `gate_proj` (the one through SiLU) and its `mlp.gate` is `up_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from trtqwen.checkpoint.mapping import Mapping
from trtqwen.errors import CheckpointError
from trtqwen.hf.config import HfConfig
from trtqwen.safetensors_io import Array

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


class Split(Enum):
    """How a tensor is divided over the tensor-parallel ranks."""

    REPLICATED = "replicated"
    COLUMN = "column"  # output features: axis 0
    ROW = "row"  # input features: axis 1
    QKV = "qkv"  # each rank's query rows, then its key rows, then its value rows
    VOCAB = "vocab"  # axis 0, padded with zero rows to a multiple of tp_size


@dataclass(frozen=True)
class TensorRule:
    """One tensor of the checkpoint.

    Attributes:
        name: its name in the rank files (layer index local to the pipeline stage).
        sources: the Hugging Face tensors it is made of.
        source_shapes: the shapes they must have.
        split: how it is divided.
        stage: the pipeline stage that holds it.
    """

    name: str
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    split: Split
    stage: int


def check_parallel(config: HfConfig, mapping: Mapping) -> None:
    """Refuse parallel sizes that the model's dimensions do not allow.

    Raises:
        CheckpointError: naming the dimension and the sizes that would work.
    """
    heads, kv_heads, tp = config.num_attention_heads, config.num_key_value_heads, mapping.tp_size
    legal = [size for size in (1, 2, 4, 8) if not _tp_problem(config, size)]
    problem = _tp_problem(config, tp)
    if problem:
        raise CheckpointError(
            f"tp_size {tp}: {problem} (model has {heads} attention heads, {kv_heads} KV heads, "
            f"intermediate size {config.intermediate_size}); use tp_size {', '.join(map(str, legal))}"
        )


def _tp_problem(config: HfConfig, tp: int) -> str:
    kv_heads = config.num_key_value_heads
    if config.num_attention_heads % tp:
        return "does not divide the attention heads"
    if (kv_heads % tp) if tp <= kv_heads else (tp % kv_heads):
        return "neither divides nor repeats the KV heads evenly"
    if config.intermediate_size % tp:
        return "does not divide the intermediate size"
    return ""


def tensor_rules(config: HfConfig, mapping: Mapping, *, tied: bool) -> Iterator[TensorRule]:
    """Every tensor of the checkpoint, ordered as in the rank files.

    Args:
        tied: whether lm_head is a copy of the embedding.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    yield TensorRule("transformer.vocab_embedding.weight", (EMBEDDING,), ((vocab, hidden),), Split.REPLICATED, 0)
    for stage in range(mapping.pp_size):
        for local, layer in enumerate(mapping.stage_layers(stage, config.num_hidden_layers)):
            yield from _layer_rules(config, f"transformer.layers.{local}", f"model.layers.{layer}", stage)
    last = mapping.pp_size - 1
    yield TensorRule("transformer.ln_f.weight", ("model.norm.weight",), ((hidden,),), Split.REPLICATED, last)
    head = EMBEDDING if tied else LM_HEAD
    yield TensorRule("lm_head.weight", (head,), ((vocab, hidden),), Split.VOCAB, last)


def _layer_rules(config: HfConfig, target: str, source: str, stage: int) -> Iterator[TensorRule]:
    hidden, inner = config.hidden_size, config.intermediate_size
    rows = tuple(
        heads * config.head_size
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )

    def rule(name: str, sources: Sequence[str], shapes: Sequence[tuple[int, ...]], split: Split) -> TensorRule:
        names = tuple(f"{source}.{name}" for name in sources)
        return TensorRule(f"{target}.{name}", names, tuple(shapes), split, stage)

    projections = [f"self_attn.{letter}_proj" for letter in "qkv"]
    yield rule("input_layernorm.weight", ["input_layernorm.weight"], [(hidden,)], Split.REPLICATED)
    yield rule("attention.qkv.weight", [p + ".weight" for p in projections], [(r, hidden) for r in rows], Split.QKV)
    yield rule("attention.qkv.bias", [p + ".bias" for p in projections], [(r,) for r in rows], Split.QKV)
    yield rule("attention.dense.weight", ["self_attn.o_proj.weight"], [(hidden, rows[0])], Split.ROW)
    yield rule("post_layernorm.weight", ["post_attention_layernorm.weight"], [(hidden,)], Split.REPLICATED)
    yield rule("mlp.fc.weight", ["mlp.gate_proj.weight"], [(inner, hidden)], Split.COLUMN)
    yield rule("mlp.gate.weight", ["mlp.up_proj.weight"], [(inner, hidden)], Split.COLUMN)
    yield rule("mlp.proj.weight", ["mlp.down_proj.weight"], [(hidden, inner)], Split.ROW)


def shard(split: Split, tensors: Sequence[Array], config: HfConfig, tp_size: int, tp_rank: int) -> list[Array]:
    """One rank's part of a tensor: views of the sources, to be joined along axis 0 (only padding is new memory)."""
    if split is Split.REPLICATED:
        return [tensors[0]]
    if split is Split.QKV:
        query, *key_value = tensors
        kv_heads = config.num_key_value_heads
        kv_parts, kv_rank = min(tp_size, kv_heads), tp_rank * min(tp_size, kv_heads) // tp_size
        return [_part(query, 0, tp_size, tp_rank)] + [_part(t, 0, kv_parts, kv_rank) for t in key_value]
    if split is Split.VOCAB:
        rows = -(-tensors[0].shape[0] // tp_size)
        part = tensors[0][tp_rank * rows : (tp_rank + 1) * rows]
        padding = np.zeros((rows - part.shape[0], *part.shape[1:]), part.dtype)
        return [part, padding] if len(padding) else [part]
    return [_part(tensors[0], 0 if split is Split.COLUMN else 1, tp_size, tp_rank)]


def _part(tensor: Array, axis: int, parts: int, index: int) -> Array:
    size = tensor.shape[axis] // parts
    return tensor[index * size : (index + 1) * size] if axis == 0 else tensor[:, index * size : (index + 1) * size]

"""Sharding of a tensor over the tensor-parallel ranks, and the models that allow it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.diagnostics import CheckpointError
from trtqwen.hf.config import HfConfig
from trtqwen.safetensors_io.format import Array


class Split(Enum):
    """How a tensor is divided over the tensor-parallel ranks."""

    REPLICATED = "replicated"
    COLUMN = "column"  # output features: axis 0
    ROW = "row"  # input features: axis 1
    QKV = "qkv"  # each rank's query rows, then its key rows, then its value rows
    VOCAB = "vocab"  # axis 0, padded with zero rows to a multiple of tp_size


def check_parallel(config: HfConfig, mapping: RankMapping) -> None:
    """Refuse parallel sizes that the model's dimensions do not allow.

    Raises:
        CheckpointError: naming the dimension and the sizes that would work.
    """
    heads, kv_heads, tp = config.num_attention_heads, config.num_key_value_heads, mapping.tp_size
    legal = [size for size in (1, 2, 4, 8) if not _tp_problem(config, size)]
    problem = _tp_problem(config, tp)
    if problem:
        raise CheckpointError(
            (
                f"tp_size {tp}: {problem} (model has {heads} attention heads, {kv_heads} KV heads, "
                f"intermediate size {config.intermediate_size})"
            ),
            f"use tp_size {', '.join(map(str, legal))}",
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

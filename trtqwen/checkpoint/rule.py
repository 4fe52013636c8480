"""The parts that the rules of every precision share: rules, precisions and linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtqwen.checkpoint.sharding import Split
from trtqwen.hf.config import HfConfig
from trtqwen.quantize.smoothquant import ActivationRange, SmoothQuantMode
from trtqwen.quantize.weight_only import Int8Layout
from trtqwen.safetensors_io.format import Array, TensorSpec

Parts = dict[str, list[Array]]
Shape = tuple[int, ...]
Ranges = Mapping[str, ActivationRange]
FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)


@dataclass(frozen=True)
class Precision:
    """The precision of a checkpoint.

    Attributes:
        dtype: of everything that is not quantized.
        int8_layout: write INT8 weight-only matrices in this layout.
        smoothquant: SmoothQuant in this mode; None otherwise.
        alpha: SmoothQuant's share of the difficulty that goes to the weights.
        int8_kv_cache: write the KV cache's scales.
    """

    dtype: np.dtype[Any]
    int8_layout: Int8Layout | None = None
    smoothquant: SmoothQuantMode | None = None
    alpha: float = 0.5
    int8_kv_cache: bool = False

    @property
    def float16_anywhere(self) -> bool:
        """Whether a weight beyond float16's range would become infinite."""
        return self.dtype == np.float16 or self.through_float16

    @property
    def through_float16(self) -> bool:
        """Whether every weight is rounded to float16 first, as NVIDIA's calibrated path does."""
        return self.smoothquant is not None or self.int8_kv_cache


@dataclass(frozen=True)
class Rule:
    """A group of checkpoint tensors that are made together.

    Attributes:
        sources: the Hugging Face tensors they are made of, with the shapes these must have.
        stage: the pipeline stage that holds them.
        specs: their names in the rank files (layer index local to the stage), shapes and dtypes; alike on all ranks.
        produce: makes each tensor's parts, to be joined along axis 0, for one tensor-parallel rank after another, of
            the sources and of the activation ranges by Hugging Face module name, which are empty where nothing was
            calibrated.
        via: dtype to round the parts to before they become what `specs` says.
        replicated: every tensor-parallel rank holds the same; `produce` makes it only once.
    """

    sources: Mapping[str, Shape]
    stage: int
    specs: dict[str, TensorSpec]
    produce: Callable[[Sequence[Array], Ranges], Iterable[Parts]]
    via: np.dtype[Any] | None = None
    replicated: bool = False


@dataclass(frozen=True)
class Linear:
    """A linear layer: TensorRT-LLM's name, Hugging Face's modules, [out, in] of each, and how it is split."""

    name: str
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    split: Split


def linear_layers(config: HfConfig) -> tuple[Linear, Linear, Linear, Linear, Linear]:
    """qkv, dense, fc, gate and proj of every layer."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_size
    query, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    return (
        Linear(
            "attention.qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ((query, hidden), (kv, hidden), (kv, hidden)),
            Split.QKV,
        ),
        Linear("attention.dense", ("self_attn.o_proj",), ((hidden, query),), Split.ROW),
        Linear("mlp.fc", ("mlp.gate_proj",), ((inner, hidden),), Split.COLUMN),
        Linear("mlp.gate", ("mlp.up_proj",), ((inner, hidden),), Split.COLUMN),
        Linear("mlp.proj", ("mlp.down_proj",), ((hidden, inner),), Split.ROW),
    )


def to_float16(tensor: Array) -> Array:
    """Convert a tensor to float16; one that is float16 already is not copied."""
    return tensor.astype(np.float16, copy=False)

"""How each tensor of a Qwen2 checkpoint is made from Hugging Face tensors and split over ranks.

Names and splits follow NVIDIA's Qwen2 converter; note that TensorRT-LLM's `mlp.fc` is `gate_proj` (the one through
SiLU) and its `mlp.gate` is `up_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.rule import (
    FLOAT32,
    INT8,
    Linear,
    Parts,
    Precision,
    Ranges,
    Rule,
    Shape,
    linear_layers,
    to_float16,
)
from trtqwen.checkpoint.shapes import TILE
from trtqwen.checkpoint.sharding import Split, shard
from trtqwen.checkpoint.smoothquant_tensors import SmoothRules
from trtqwen.hf.config import HfConfig
from trtqwen.hf.names import EMBEDDING, LM_HEAD
from trtqwen.quantize.weight_only import quantize_to_layout
from trtqwen.safetensors_io.format import Array, TensorSpec


class RuleBook:
    """The rules of one model, mapping and precision."""

    def __init__(self, config: HfConfig, parallel: RankMapping, precision: Precision, *, embedding: Split) -> None:
        self._config = config
        self._parallel = parallel
        self._precision = precision
        self._embedding = embedding

    def rules(self, *, tied: bool) -> Iterator[Rule]:
        """Every rule, in the order of the rank files.

        Args:
            tied: whether lm_head is a copy of the embedding.
        """
        config, last = self._config, self._parallel.pp_size - 1
        table = (config.vocab_size, config.hidden_size)
        yield self._float("transformer.vocab_embedding.weight", {EMBEDDING: table}, self._embedding, 0)
        for stage in range(self._parallel.pp_size):
            for local, layer in enumerate(self._parallel.stage_layers(stage, config.num_hidden_layers)):
                yield from self._layer(f"transformer.layers.{local}", f"model.layers.{layer}", stage)
        norm = {"model.norm.weight": (config.hidden_size,)}
        yield self._float("transformer.ln_f.weight", norm, Split.REPLICATED, last)
        yield self._float("lm_head.weight", {EMBEDDING if tied else LM_HEAD: table}, Split.VOCAB, last)

    def _layer(self, target: str, source: str, stage: int) -> Iterator[Rule]:
        precision, hidden = self._precision, self._config.hidden_size
        if precision.int8_kv_cache:
            yield self._kv_scale(target, source, stage)
        if precision.smoothquant is not None:
            smooth = SmoothRules(self._config, self._parallel, precision, precision.smoothquant)
            yield from smooth.layer(target, source, stage)
            return
        qkv, *others = linear_layers(self._config)
        norms = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
        for name, module in norms.items():
            sources = {f"{source}.{module}.weight": (hidden,)}
            yield self._float(f"{target}.{name}.weight", sources, Split.REPLICATED, stage)
        biases = {f"{source}.{m}.bias": shape[:1] for m, shape in zip(qkv.modules, qkv.shapes, strict=True)}
        yield self._float(f"{target}.attention.qkv.bias", biases, Split.QKV, stage)
        for linear in (qkv, *others):
            yield self._linear(target, source, stage, linear)

    def _float(self, name: str, sources: Mapping[str, Shape], split: Split, stage: int) -> Rule:
        replicated = split is Split.REPLICATED

        def produce(tensors: Sequence[Array], ranges: Ranges) -> Iterator[Parts]:
            for tp_rank in range(1 if replicated else self._parallel.tp_size):
                yield {name: self._shard(split, tensors, tp_rank)}

        # Views of nothing, in the sources' shapes: sharding them tells the shape of a shard.
        empty = [np.broadcast_to(np.int8(0), shape) for shape in sources.values()]
        spec = TensorSpec(_joined_shape(self._shard(split, empty, 0)), self._precision.dtype)
        via = np.dtype(np.float16) if self._precision.through_float16 else None
        return Rule(sources, stage, {name: spec}, produce, via, replicated)

    def _linear(self, target: str, source: str, stage: int, linear: Linear) -> Rule:
        sources = {f"{source}.{m}.weight": shape for m, shape in zip(linear.modules, linear.shapes, strict=True)}
        name, layout = f"{target}.{linear.name}", self._precision.int8_layout
        float_rule = self._float(f"{name}.weight", sources, linear.split, stage)
        if layout is None:
            return float_rule
        rounded = self._precision.through_float16
        out, inner = self._padded(linear, float_rule.specs[f"{name}.weight"].shape)
        specs = {
            f"{name}.weight": TensorSpec((inner, out), INT8),
            f"{name}.per_channel_scale": TensorSpec((out,), self._precision.dtype),
        }

        def produce(tensors: Sequence[Array], ranges: Ranges) -> Iterator[Parts]:
            for tp_rank in range(self._parallel.tp_size):
                local = self._local(linear, tensors, tp_rank, (out, inner))
                weight = to_float16(local) if rounded else local
                stored, steps = quantize_to_layout(weight, layout, self._precision.dtype)
                yield {f"{name}.weight": [stored], f"{name}.per_channel_scale": [steps]}

        return Rule(sources, stage, specs, produce)

    def _padded(self, linear: Linear, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rank-local [out, in], the intermediate size padded as TensorRT-LLM's layers pad it."""
        unit = TILE * self._parallel.tp_size
        inner = -(-self._config.intermediate_size // unit) * TILE
        if linear.name in ("mlp.fc", "mlp.gate"):
            return inner, shape[1]
        return (shape[0], inner) if linear.name == "mlp.proj" else (shape[0], shape[1])

    def _local(self, linear: Linear, tensors: Sequence[Array], tp_rank: int, shape: tuple[int, int]) -> Array:
        """One rank's matrix in the source's dtype: real rows and columns first, then zeros in the last ranks."""
        if linear.split is Split.QKV:
            return np.concatenate(self._shard(linear.split, tensors, tp_rank))
        axis = 0 if linear.split is Split.COLUMN else 1
        span = slice(tp_rank * shape[axis], (tp_rank + 1) * shape[axis])
        part = tensors[0][span] if axis == 0 else tensors[0][:, span]
        if part.shape == shape:
            return part
        local = np.zeros(shape, part.dtype)
        local[: part.shape[0], : part.shape[1]] = part
        return local

    def _kv_scale(self, target: str, source: str, stage: int) -> Rule:
        """Return the scale of a layer's keys and values: the largest output of all projections divided by 127."""
        name = f"{target}.attention.kv_cache_scaling_factor"

        def produce(tensors: Sequence[Array], ranges: Ranges) -> Iterator[Parts]:
            span = max(float(ranges[f"{source}.self_attn.{letter}_proj"].y.max()) for letter in "qkv")
            for _ in range(self._parallel.tp_size):
                yield {name: [np.array([span / 127.0], np.float32)]}

        return Rule({}, stage, {name: TensorSpec((1,), FLOAT32)}, produce)

    def _shard(self, split: Split, tensors: Sequence[Array], tp_rank: int) -> list[Array]:
        return shard(split, tensors, self._config, self._parallel.tp_size, tp_rank)


def _joined_shape(parts: Sequence[Array]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

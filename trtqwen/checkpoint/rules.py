"""How each tensor of a Qwen2 checkpoint is made from Hugging Face tensors and split over ranks, in every precision.

Names and splits follow NVIDIA's Qwen2 converter; note that TensorRT-LLM's `mlp.fc` is `gate_proj` (the one through
SiLU) and its `mlp.gate` is `up_proj`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtqwen.checkpoint.layout import Split, shard
from trtqwen.checkpoint.mapping import Mapping as Parallel
from trtqwen.hf.config import HfConfig
from trtqwen.quantize.smoothquant import (
    ActivationRange,
    SmoothQuantMode,
    quantize_linear,
    quantize_qkv,
    smooth_gain,
    smooth_weight,
    smoother,
)
from trtqwen.quantize.weight_only import Int8Layout, quantize_to_layout
from trtqwen.safetensors_io import Array, TensorSpec

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
TILE = 64  # sizes of INT8 weight-only matrices, for each rank
Parts = dict[str, list[Array]]
Shape = tuple[int, ...]
Ranges = Mapping[str, ActivationRange]
FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)


@dataclass(frozen=True)
class Precision:
    """What the numbers become.

    Attributes:
        dtype: of everything that is not quantised.
        int8_layout: write INT8 weight-only matrices in this layout.
        smoothquant: SmoothQuant in this mode; None otherwise.
        alpha: SmoothQuant's share of the difficulty that goes to the weights.
        int8_kv_cache: write the KV cache's scales.
        ranges: activation ranges by Hugging Face module name; SmoothQuant and INT8 KV need them to produce tensors.
    """

    dtype: np.dtype[Any]
    int8_layout: Int8Layout | None = None
    smoothquant: SmoothQuantMode | None = None
    alpha: float = 0.5
    int8_kv_cache: bool = False
    ranges: Ranges | None = None

    @property
    def float16_anywhere(self) -> bool:
        """Whether a weight beyond float16's range would become infinite."""
        return self.dtype == np.float16 or self.through_float16

    @property
    def through_float16(self) -> bool:
        """Whether every weight is rounded to float16 on its way, as NVIDIA's calibrated path does."""
        return self.smoothquant is not None or self.int8_kv_cache


@dataclass(frozen=True)
class Rule:
    """A few tensors of the checkpoint that are made together.

    Attributes:
        sources: the Hugging Face tensors they are made of, with the shapes these must have.
        stage: the pipeline stage that holds them.
        specs: their names in the rank files (layer index local to the stage), shapes and dtypes; alike on all ranks.
        produce: makes each tensor's parts, to be joined along axis 0, for one tensor-parallel rank after another.
        via: dtype to round the parts to before they become what `specs` says.
        replicated: every tensor-parallel rank holds the same; `produce` makes it only once.
    """

    sources: Mapping[str, Shape]
    stage: int
    specs: dict[str, TensorSpec]
    produce: Callable[[Sequence[Array]], Iterable[Parts]]
    via: np.dtype[Any] | None = None
    replicated: bool = False


@dataclass(frozen=True)
class _Linear:
    """A linear layer: TensorRT-LLM's name, Hugging Face's modules, [out, in] of each, and how it is split."""

    name: str
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    split: Split


class RuleBook:
    """The rules of one model, mapping and precision."""

    def __init__(self, config: HfConfig, parallel: Parallel, precision: Precision, *, embedding: Split) -> None:
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
        qkv, dense, fc, gate, proj = self._linears()
        if precision.int8_kv_cache:
            yield self._kv_scale(target, source, stage)
        if precision.smoothquant is not None:
            ln1, ln2 = "input_layernorm", "post_layernorm"
            yield self._smooth_qkv(target, source, stage, qkv, ln1)
            yield self._smooth_row(target, source, stage, dense, "attention")
            yield self._smooth_mlp(target, source, stage, (fc, gate), ln2)
            yield self._smooth_row(target, source, stage, proj, "mlp")
            return
        norms = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
        for name, module in norms.items():
            sources = {f"{source}.{module}.weight": (hidden,)}
            yield self._float(f"{target}.{name}.weight", sources, Split.REPLICATED, stage)
        biases = {f"{source}.{m}.bias": shape[:1] for m, shape in zip(qkv.modules, qkv.shapes, strict=True)}
        yield self._float(f"{target}.attention.qkv.bias", biases, Split.QKV, stage)
        for linear in (qkv, dense, fc, gate, proj):
            yield self._linear(target, source, stage, linear)

    def _linears(self) -> tuple[_Linear, _Linear, _Linear, _Linear, _Linear]:
        config = self._config
        hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_size
        query, kv = config.num_attention_heads * size, config.num_key_value_heads * size
        return (
            _Linear(
                "attention.qkv",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ((query, hidden), (kv, hidden), (kv, hidden)),
                Split.QKV,
            ),
            _Linear("attention.dense", ("self_attn.o_proj",), ((hidden, query),), Split.ROW),
            _Linear("mlp.fc", ("mlp.gate_proj",), ((inner, hidden),), Split.COLUMN),
            _Linear("mlp.gate", ("mlp.up_proj",), ((inner, hidden),), Split.COLUMN),
            _Linear("mlp.proj", ("mlp.down_proj",), ((hidden, inner),), Split.ROW),
        )

    def _float(self, name: str, sources: Mapping[str, Shape], split: Split, stage: int) -> Rule:
        replicated = split is Split.REPLICATED

        def produce(tensors: Sequence[Array]) -> Iterator[Parts]:
            for tp_rank in range(1 if replicated else self._parallel.tp_size):
                yield {name: self._shard(split, tensors, tp_rank)}

        # Views of nothing, in the sources' shapes: sharding them tells the shape of a shard.
        empty = [np.broadcast_to(np.int8(0), shape) for shape in sources.values()]
        spec = TensorSpec(_joined_shape(self._shard(split, empty, 0)), self._precision.dtype)
        via = np.dtype(np.float16) if self._precision.through_float16 else None
        return Rule(sources, stage, {name: spec}, produce, via, replicated)

    def _linear(self, target: str, source: str, stage: int, linear: _Linear) -> Rule:
        sources = {f"{source}.{m}.weight": shape for m, shape in zip(linear.modules, linear.shapes, strict=True)}
        name, layout = f"{target}.{linear.name}", self._precision.int8_layout
        float_rule = self._float(f"{name}.weight", sources, linear.split, stage)
        if layout is None:
            return float_rule
        half = self._precision.through_float16
        out, inner = self._padded(linear, float_rule.specs[f"{name}.weight"].shape)
        specs = {
            f"{name}.weight": TensorSpec((inner, out), INT8),
            f"{name}.per_channel_scale": TensorSpec((out,), self._precision.dtype),
        }

        def produce(tensors: Sequence[Array]) -> Iterator[Parts]:
            for tp_rank in range(self._parallel.tp_size):
                local = self._local(linear, tensors, tp_rank, (out, inner))
                weight = _half(local) if half else local
                stored, steps = quantize_to_layout(weight, layout, self._precision.dtype)
                yield {f"{name}.weight": [stored], f"{name}.per_channel_scale": [steps]}

        return Rule(sources, stage, specs, produce)

    def _padded(self, linear: _Linear, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rank-local [out, in], the intermediate size padded as TensorRT-LLM's layers pad it."""
        unit = TILE * self._parallel.tp_size
        inner = -(-self._config.intermediate_size // unit) * TILE
        if linear.name in ("mlp.fc", "mlp.gate"):
            return inner, shape[1]
        return (shape[0], inner) if linear.name == "mlp.proj" else (shape[0], shape[1])

    def _local(self, linear: _Linear, tensors: Sequence[Array], tp_rank: int, shape: tuple[int, int]) -> Array:
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
        """One step for keys and values of a layer: the largest output of all three projections, by 127."""
        name = f"{target}.attention.kv_cache_scaling_factor"

        def produce(tensors: Sequence[Array]) -> Iterator[Parts]:
            span = max(float(self._range(f"{source}.self_attn.{letter}_proj").y.max()) for letter in "qkv")
            for _ in range(self._parallel.tp_size):
                yield {name: [np.array([span / 127.0], np.float32)]}

        return Rule({}, stage, {name: TensorSpec((1,), FLOAT32)}, produce)

    def _smooth_qkv(self, target: str, source: str, stage: int, linear: _Linear, norm: str) -> Rule:
        config, mode, name = self._config, self._mode, f"{target}.attention.qkv"
        modules = [f"{source}.{module}" for module in linear.modules]
        sources: dict[str, Shape] = {f"{source}.input_layernorm.weight": (config.hidden_size,)}
        sources |= {f"{m}.weight": shape for m, shape in zip(modules, linear.shapes, strict=True)}
        sources |= {f"{m}.bias": shape[:1] for m, shape in zip(modules, linear.shapes, strict=True)}
        rows = sum(shape[0] for shape in linear.shapes) // self._parallel.tp_size
        specs = {
            f"{target}.{norm}.weight": TensorSpec((config.hidden_size,), self._precision.dtype),
            f"{name}.weight": TensorSpec((rows, config.hidden_size), INT8),
            f"{name}.bias": TensorSpec((rows,), self._precision.dtype),
            f"{name}.per_channel_scale": TensorSpec((1, rows), FLOAT32),
            **self._static_specs(name, f"{target}.{norm}.scale_to_int"),
        }

        def produce(tensors: Sequence[Array]) -> Iterator[Parts]:
            ranges = [self._range(module) for module in modules]
            gain, weights, biases = tensors[0], [_half(tensor) for tensor in tensors[1:4]], tensors[4:]
            factor = smoother(weights, ranges[0].x, self._precision.alpha)
            both = ActivationRange(ranges[0].x, np.concatenate([span.y for span in ranges])).smoothed(factor)
            done = quantize_qkv([smooth_weight(weight, factor) for weight in weights], both, mode)
            for tp_rank in range(self._parallel.tp_size):
                scales = self._shard(Split.QKV, [scale[0] for _, scale in done], tp_rank)
                yield {
                    f"{target}.{norm}.weight": [smooth_gain(_half(gain), factor)],
                    f"{name}.weight": self._shard(Split.QKV, [quantized for quantized, _ in done], tp_rank),
                    f"{name}.bias": self._shard(Split.QKV, [_half(bias) for bias in biases], tp_rank),
                    f"{name}.per_channel_scale": [np.concatenate(scales)[None]],
                    **self._static(name, both.act_scale, f"{target}.{norm}.scale_to_int", both.scale_to_int),
                }

        return Rule(sources, stage, specs, produce)

    def _smooth_mlp(self, target: str, source: str, stage: int, linears: tuple[_Linear, _Linear], norm: str) -> Rule:
        config, mode, tp_size = self._config, self._mode, self._parallel.tp_size
        modules = [f"{source}.{linear.modules[0]}" for linear in linears]
        names = [f"{target}.{linear.name}" for linear in linears]
        sources: dict[str, Shape] = {f"{source}.post_attention_layernorm.weight": (config.hidden_size,)}
        sources |= {f"{m}.weight": linear.shapes[0] for m, linear in zip(modules, linears, strict=True)}
        rows = config.intermediate_size // tp_size
        to_int = f"{target}.{norm}.scale_to_int"
        specs = {f"{target}.{norm}.weight": TensorSpec((config.hidden_size,), self._precision.dtype)}
        for name in names:
            specs[f"{name}.weight"] = TensorSpec((rows, config.hidden_size), INT8)
            specs[f"{name}.per_channel_scale"] = TensorSpec((1, rows if mode.per_channel else 1), FLOAT32)
            specs |= self._static_specs(name)
        specs |= self._static_specs(None, to_int)

        def produce(tensors: Sequence[Array]) -> Iterator[Parts]:
            ranges = [self._range(module) for module in modules]
            gain, *matrices = tensors
            weights = [_half(matrix) for matrix in matrices]
            factor = smoother(weights, ranges[0].x, self._precision.alpha)
            spans = [span.smoothed(factor) for span in ranges]
            done = [
                quantize_linear(smooth_weight(weight, factor), span, mode, self._precision.dtype)
                for weight, span in zip(weights, spans, strict=True)
            ]
            for tp_rank in range(tp_size):
                parts: Parts = {f"{target}.{norm}.weight": [smooth_gain(_half(gain), factor)]}
                for name, span, (quantized, scale) in zip(names, spans, done, strict=True):
                    parts[f"{name}.weight"] = self._shard(Split.COLUMN, [quantized], tp_rank)
                    columns = self._shard(Split.ROW, [scale], tp_rank) if mode.per_channel else [scale]
                    parts[f"{name}.per_channel_scale"] = columns
                    parts |= self._static(name, span.act_scale)
                yield parts | self._static(None, None, to_int, spans[0].scale_to_int)

        return Rule(sources, stage, specs, produce)

    def _smooth_row(self, target: str, source: str, stage: int, linear: _Linear, block: str) -> Rule:
        """A row-parallel linear: no norm stands before it, so the runtime divides its input by the smoother."""
        mode, tp_size = self._mode, self._parallel.tp_size
        (module,), ((out, inner),) = linear.modules, linear.shapes
        name = f"{target}.{linear.name}"
        to_int = f"{target}.{block}.quantization_scaling_factor"
        specs = {
            f"{name}.weight": TensorSpec((out, inner // tp_size), INT8),
            f"{name}.per_channel_scale": TensorSpec((1, out if mode.per_channel else 1), FLOAT32),
            f"{name}.smoother": TensorSpec((1, inner // tp_size), FLOAT32),
            **({} if mode.per_token else self._static_specs(name, to_int)),
        }

        def produce(tensors: Sequence[Array]) -> Iterator[Parts]:
            span = self._range(f"{source}.{module}")
            weight = _half(tensors[0])
            factor = smoother([weight], span.x, self._precision.alpha)
            after = span.smoothed(factor)
            quantized, scale = quantize_linear(smooth_weight(weight, factor), after, mode, self._precision.dtype)
            for tp_rank in range(tp_size):
                yield {
                    f"{name}.weight": self._shard(Split.ROW, [quantized], tp_rank),
                    f"{name}.per_channel_scale": [scale],
                    f"{name}.smoother": self._shard(Split.ROW, [factor.astype(np.float32)[None]], tp_rank),
                    **({} if mode.per_token else self._static(name, after.act_scale, to_int, after.scale_to_int)),
                }

        return Rule({f"{source}.{module}.weight": (out, inner)}, stage, specs, produce)

    @property
    def _mode(self) -> SmoothQuantMode:
        assert self._precision.smoothquant is not None
        return self._precision.smoothquant

    def _static_specs(self, linear: str | None, to_int: str | None = None) -> dict[str, TensorSpec]:
        """Specs of what `_static` makes."""
        specs = {}
        if linear and not self._mode.per_token:
            specs[f"{linear}.act_scale"] = TensorSpec((), FLOAT32)
        if to_int:
            specs[to_int] = TensorSpec((1,) if self._mode.per_token else (), FLOAT32)
        return specs

    def _static(
        self, linear: str | None, act_scale: Array | None, to_int: str | None = None, factor: Array | None = None
    ) -> Parts:
        """Scales of calibrated activations; with per-token scales only a neutral factor of the norms remains."""
        parts: Parts = {}
        if linear and act_scale is not None and not self._mode.per_token:
            parts[f"{linear}.act_scale"] = [act_scale]
        if to_int and factor is not None:
            parts[to_int] = [np.ones(1, np.float32) if self._mode.per_token else factor]
        return parts

    def _shard(self, split: Split, tensors: Sequence[Array], tp_rank: int) -> list[Array]:
        return shard(split, tensors, self._config, self._parallel.tp_size, tp_rank)

    def _range(self, module: str) -> ActivationRange:
        assert self._precision.ranges is not None
        return self._precision.ranges[module]


def _half(tensor: Array) -> Array:
    return tensor.astype(np.float16, copy=False)


def _joined_shape(parts: Sequence[Array]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

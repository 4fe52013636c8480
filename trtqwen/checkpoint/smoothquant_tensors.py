"""Rules of SmoothQuant: INT8 linear layers with their scales, and norms divided by the smoother."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

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
from trtqwen.checkpoint.sharding import Split, shard
from trtqwen.hf.config import HfConfig
from trtqwen.quantize.smoothquant import (
    ActivationRange,
    Codes,
    SmoothQuantMode,
    quantize_linear,
    quantize_qkv,
    smooth_gain,
    smooth_weight,
    smoother,
)
from trtqwen.safetensors_io.format import Array, TensorSpec

THREADS = min(8, os.cpu_count() or 1)


class SmoothRules:
    """The rules of a layer's linear layers and norms, for one model, mapping and precision with SmoothQuant."""

    def __init__(self, config: HfConfig, parallel: RankMapping, precision: Precision, mode: SmoothQuantMode) -> None:
        self._config = config
        self._tp_size = parallel.tp_size
        self._precision = precision
        self._mode = mode

    def layer(self, target: str, source: str, stage: int) -> Iterator[Rule]:
        """One decoder layer, in the order of the rank files."""
        qkv, dense, fc, gate, proj = linear_layers(self._config)
        yield self._qkv(target, source, stage, qkv, "input_layernorm")
        yield self._row(target, source, stage, dense, "attention")
        yield self._mlp(target, source, stage, (fc, gate), "post_layernorm")
        yield self._row(target, source, stage, proj, "mlp")

    def _qkv(self, target: str, source: str, stage: int, linear: Linear, norm: str) -> Rule:
        config, mode, name = self._config, self._mode, f"{target}.attention.qkv"
        modules = [f"{source}.{module}" for module in linear.modules]
        sources: dict[str, Shape] = {f"{source}.input_layernorm.weight": (config.hidden_size,)}
        sources |= {f"{m}.weight": shape for m, shape in zip(modules, linear.shapes, strict=True)}
        sources |= {f"{m}.bias": shape[:1] for m, shape in zip(modules, linear.shapes, strict=True)}
        rows = sum(shape[0] for shape in linear.shapes) // self._tp_size
        specs = {
            f"{target}.{norm}.weight": TensorSpec((config.hidden_size,), self._precision.dtype),
            f"{name}.weight": TensorSpec((rows, config.hidden_size), INT8),
            f"{name}.bias": TensorSpec((rows,), self._precision.dtype),
            f"{name}.per_channel_scale": TensorSpec((1, rows), FLOAT32),
            **self._static_specs(name, f"{target}.{norm}.scale_to_int"),
        }

        def produce(tensors: Sequence[Array], ranges: Ranges) -> Iterator[Parts]:
            spans = [ranges[module] for module in modules]
            gain, weights, biases = tensors[0], tensors[1:4], tensors[4:]
            with ThreadPoolExecutor(THREADS) as pool:
                factor = smoother(weights, spans[0].x, self._precision.alpha, pool)
                both = ActivationRange(spans[0].x, np.concatenate([span.y for span in spans])).smoothed(factor)
                done = quantize_qkv([smooth_weight(weight, factor, pool) for weight in weights], both, mode)
                for tp_rank in range(self._tp_size):
                    scales = self._shard(Split.QKV, [scale[0] for _, scale in done], tp_rank)
                    yield {
                        f"{target}.{norm}.weight": [smooth_gain(to_float16(gain), factor)],
                        f"{name}.weight": self._shard_codes(Split.QKV, [codes for codes, _ in done], tp_rank),
                        f"{name}.bias": self._shard(Split.QKV, [to_float16(bias) for bias in biases], tp_rank),
                        f"{name}.per_channel_scale": [np.concatenate(scales)[None]],
                        **self._static(name, both.act_scale, f"{target}.{norm}.scale_to_int", both.scale_to_int),
                    }

        return Rule(sources, stage, specs, produce)

    def _mlp(self, target: str, source: str, stage: int, linears: tuple[Linear, Linear], norm: str) -> Rule:
        config, mode, tp_size = self._config, self._mode, self._tp_size
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

        def produce(tensors: Sequence[Array], ranges: Ranges) -> Iterator[Parts]:
            gain, *weights = tensors
            with ThreadPoolExecutor(THREADS) as pool:
                factor = smoother(weights, ranges[modules[0]].x, self._precision.alpha, pool)
                spans = [ranges[module].smoothed(factor) for module in modules]
                done = [
                    quantize_linear(smooth_weight(weight, factor, pool), span, mode, self._precision.dtype)
                    for weight, span in zip(weights, spans, strict=True)
                ]
                for tp_rank in range(tp_size):
                    parts: Parts = {f"{target}.{norm}.weight": [smooth_gain(to_float16(gain), factor)]}
                    for name, span, (codes, scale) in zip(names, spans, done, strict=True):
                        parts[f"{name}.weight"] = self._shard_codes(Split.COLUMN, [codes], tp_rank)
                        columns = self._shard(Split.ROW, [scale], tp_rank) if mode.per_channel else [scale]
                        parts[f"{name}.per_channel_scale"] = columns
                        parts |= self._static(name, span.act_scale)
                    yield parts | self._static(None, None, to_int, spans[0].scale_to_int)

        return Rule(sources, stage, specs, produce)

    def _row(self, target: str, source: str, stage: int, linear: Linear, block: str) -> Rule:
        """A row-parallel linear: no norm stands before it, so the runtime divides its input by the smoother."""
        mode, tp_size = self._mode, self._tp_size
        (module,), ((out, inner),) = linear.modules, linear.shapes
        name = f"{target}.{linear.name}"
        to_int = f"{target}.{block}.quantization_scaling_factor"
        specs = {
            f"{name}.weight": TensorSpec((out, inner // tp_size), INT8),
            f"{name}.per_channel_scale": TensorSpec((1, out if mode.per_channel else 1), FLOAT32),
            f"{name}.smoother": TensorSpec((1, inner // tp_size), FLOAT32),
            **({} if mode.per_token else self._static_specs(name, to_int)),
        }

        def produce(tensors: Sequence[Array], ranges: Ranges) -> Iterator[Parts]:
            span = ranges[f"{source}.{module}"]
            with ThreadPoolExecutor(THREADS) as pool:
                factor = smoother(tensors, span.x, self._precision.alpha, pool)
                after = span.smoothed(factor)
                weight = smooth_weight(tensors[0], factor, pool)
                codes, scale = quantize_linear(weight, after, mode, self._precision.dtype)
                for tp_rank in range(tp_size):
                    yield {
                        f"{name}.weight": self._shard_codes(Split.ROW, [codes], tp_rank),
                        f"{name}.per_channel_scale": [scale],
                        f"{name}.smoother": self._shard(Split.ROW, [factor.astype(np.float32)[None]], tp_rank),
                        **({} if mode.per_token else self._static(name, after.act_scale, to_int, after.scale_to_int)),
                    }

        return Rule({f"{source}.{module}.weight": (out, inner)}, stage, specs, produce)

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
        return shard(split, tensors, self._config, self._tp_size, tp_rank)

    def _shard_codes(self, split: Split, codes: Sequence[Codes], tp_rank: int) -> list[Array]:
        """Return the shard of INT8 codes, which have the interface of arrays that sharding and writing need."""
        return self._shard(split, cast(Sequence[Array], codes), tp_rank)

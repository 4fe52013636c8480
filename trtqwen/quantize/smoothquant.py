"""SmoothQuant (W8A8): scales moved from activations to weights, then INT8 for both, for TensorRT-LLM's plugins.

Formulas and their roundings are those of NVIDIA's Qwen2 converter; the model counts as float16 throughout, whatever
it was stored in, because that converter calibrates and smooths in float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trtqwen.errors import CheckpointError

Array = npt.NDArray[Any]
Int8 = npt.NDArray[np.int8]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_FLOOR = 1e-5
_LIMIT = 127.0
_OVERFLOW = 65520.0  # rounds to infinity in float16


@dataclass(frozen=True)
class SmoothQuantMode:
    """Which scales are shared.

    Attributes:
        per_channel: one weight scale for each output channel, instead of one for the tensor.
        per_token: activations are scaled token by token at run time, instead of by calibrated ranges.
    """

    per_channel: bool
    per_token: bool

    @property
    def quant_algo(self) -> str:
        """The name in config.json: granularity of the weights, then of the activations."""
        weights = "PER_CHANNEL" if self.per_channel else "PER_TENSOR"
        if self.per_token:
            return f"W8A8_SQ_{weights}_PER_TOKEN_PLUGIN"
        return "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN" if self.per_channel else "W8A8_SQ_PER_TENSOR_PLUGIN"


@dataclass(frozen=True)
class ActivationRange:
    """Largest magnitudes seen in calibration at one linear layer: of its inputs and of its outputs with bias.

    Attributes:
        x: float32 [in].
        y: float32 [out].
    """

    x: Float32
    y: Float32

    def smoothed(self, factor: Float64) -> SmoothedRange:
        """The ranges after the inputs were divided by the smoother."""
        return SmoothedRange(float((self.x / factor).max()), float(self.y.max()))


@dataclass(frozen=True)
class SmoothedRange:
    """Largest input and output of a linear layer after smoothing."""

    x: float
    y: float

    @property
    def act_scale(self) -> Float32:
        """Step of the quantised output, []."""
        return np.array(self.y / _LIMIT, np.float32)

    @property
    def scale_to_int(self) -> Float32:
        """Factor from inputs to their int8 codes, []."""
        return np.array(_LIMIT / self.x, np.float32)


def smoother(weights: Sequence[Float16], x: Float32, alpha: float) -> Float64:
    """The factor of each input channel, float64 [in]: activations are divided by it and weights multiplied.

    s = max(x^alpha / max|W|^(1 - alpha), 1e-5), the maximum over the rows of all `weights` that share the input.
    """
    largest = np.max([_largest(weight, axis=0) for weight in weights], axis=0).astype(np.float64)
    powers: Float64 = np.power(x.astype(np.float64), alpha) / np.power(largest.clip(_FLOOR), 1 - alpha)
    return powers.clip(_FLOOR)


def smooth_weight(weight: Float16, factor: Float64) -> Float16:
    """float16 [out, in] with its input channels multiplied by the smoother.

    Raises:
        CheckpointError: if that leaves the range of float16.
    """
    smoothed = np.empty(weight.shape, np.float16)
    for rows in _row_blocks(weight):
        product = (weight[rows] * factor).astype(np.float32)  # torch rounds to float16 by way of float32
        if np.abs(product).max() >= _OVERFLOW:
            raise CheckpointError("smoothing takes weights out of float16's range; lower sq_alpha")
        smoothed[rows] = product
    return smoothed


def smooth_gain(gain: Float16, factor: Float64) -> Float16:
    """A norm's weight, float16 [in], divided by the smoother of the linear layers behind it.

    Channels that were never active in calibration have the smallest smoother; they stay finite.
    """
    limit = float(np.finfo(np.float16).max)
    return (gain / factor).clip(-limit, limit).astype(np.float32).astype(np.float16)


def quantize_linear(
    weight: Float16, span: SmoothedRange, mode: SmoothQuantMode, dtype: np.dtype[Any]
) -> tuple[Int8, Float32]:
    """Quantise a smoothed linear layer other than qkv.

    Args:
        weight: float16 [out, in], smoothed.
        dtype: of the checkpoint: the weight is rounded to it before it is quantised.

    Returns:
        int8 [out, in] and `per_channel_scale`, float32 [1, out], or [1, 1] where the tensor shares it.
    """
    if mode.per_channel:
        factors = _to_int8(_largest(weight, axis=1))
        return _round_rows(weight.astype(dtype), factors), _scale(factors, span, mode)[None]
    factor = _to_int8(_largest(weight, axis=1).max())
    quantized = np.empty(weight.shape, np.int8)
    for rows in _row_blocks(weight):
        product = weight[rows].astype(dtype).astype(np.float32) * np.float32(factor)
        quantized[rows] = _round(product.astype(dtype).astype(np.float32))
    return quantized, _scale(factor, span, mode).reshape(1, 1)


def quantize_qkv(
    weights: Sequence[Float16], span: SmoothedRange, mode: SmoothQuantMode
) -> list[tuple[Int8, Float32]]:
    """Quantise the query, key and value projections, which share their input and output ranges.

    Returns:
        for each, int8 [out, in] and `per_channel_scale`, float32 [1, out]: one step a tensor is repeated.
    """
    results = []
    for weight in weights:
        if mode.per_channel:
            factors = _to_int8(_largest(weight, axis=1))
            quantized = _round_rows(weight, factors)
        else:
            factors = np.full(len(weight), _to_int8(_largest(weight, axis=1).max()))
            step = _inverse(factors[:1])
            quantized = np.empty(weight.shape, np.int8)
            for rows in _row_blocks(weight):
                quantized[rows] = _round((weight[rows] / step).astype(np.float32))
        results.append((quantized, _scale(factors, span, mode)[None]))
    return results


def _scale(factors: Float16, span: SmoothedRange, mode: SmoothQuantMode) -> Float32:
    """From the int32 accumulator to the output: to a float, or to the output's int8 code for static activations."""
    if mode.per_token:
        return _inverse(factors).astype(np.float32)
    output = np.float32(1 / np.float32(span.y)) * np.float32(_LIMIT)
    if factors.ndim == 0:  # NVIDIA's converter computes with Python floats here
        return np.array(output.astype(np.float64) / (_LIMIT / span.x * np.float64(factors)), np.float32)
    return output / (np.float32(_LIMIT / span.x) * factors.astype(np.float32))


def _to_int8(maxima: Float16) -> Float16:
    """127 / w as torch computes it in float16: the rounded reciprocal times 127. Rows of zeros stay finite."""
    factors = _inverse(maxima).astype(np.float32) * np.float32(_LIMIT)
    return np.minimum(factors, np.finfo(np.float16).max).astype(np.float16)


def _inverse(values: Float16) -> Float16:
    with np.errstate(divide="ignore", over="ignore"):
        return (1 / np.asarray(values, np.float32)).astype(np.float16)


def _largest(weight: Float16, axis: int) -> Float16:
    """Largest magnitudes along an axis: as integers, which order alike and compare ten times faster."""
    bits: npt.NDArray[np.uint16] = (weight.view(np.uint16) & np.uint16(0x7FFF)).max(axis=axis)
    return bits.view(np.float16)


def _round_rows(weight: Array, factors: Float16) -> Int8:
    quantized = np.empty(weight.shape, np.int8)
    for rows in _row_blocks(weight):
        quantized[rows] = _round(weight[rows].astype(np.float32) * factors[rows, None].astype(np.float32))
    return quantized


def _round(values: Float32) -> Int8:
    return np.rint(values).clip(-_LIMIT, _LIMIT).astype(np.int8)


def _row_blocks(weight: Array) -> Iterator[slice]:
    for start in range(0, len(weight), 1024):
        yield slice(start, start + 1024)

"""SmoothQuant (W8A8): scales moved from activations to weights, then INT8 for both, for TensorRT-LLM's plugins.

Formulas and their roundings are those of NVIDIA's Qwen2 converter; the model counts as float16 throughout, for any
it was stored in, because that converter calibrates and smooths in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trtqwen.diagnostics import CheckpointError

Array = npt.NDArray[Any]
Int8 = npt.NDArray[np.int8]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_FLOOR = 1e-5
_LIMIT = 127.0
_OVERFLOW = 65520.0  # rounds to infinity in float16
_FLOAT16 = np.dtype(np.float16)
_FORMATS = {_FLOAT16: (10, 2.0**-14), np.dtype(ml_dtypes.bfloat16): (7, 2.0**-126)}  # mantissa bits, smallest normal
_CACHED_ELEMENTS = 1 << 16  # worked on at a time: stays in a core's cache, in float64 too
_REDUCED_ELEMENTS = 1 << 20  # read at a time where only maxima are taken


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
        """Step of the quantized output, []."""
        return np.array(self.y / _LIMIT, np.float32)

    @property
    def scale_to_int(self) -> Float32:
        """Factor from inputs to their int8 codes, []."""
        return np.array(_LIMIT / self.x, np.float32)


def smoother(weights: Sequence[Array], x: Float32, alpha: float, pool: Executor) -> Float64:
    """The factor of each input channel, float64 [in]: activations are divided by it and weights multiplied.

    s = max(x^alpha / max|W|^(1 - alpha), 1e-5), the maximum over the rows of all `weights` that share the input.
    """
    largest = np.max([_largest_columns(weight, pool) for weight in weights], axis=0)
    largest = largest.astype(np.float16).astype(np.float64)
    powers: Float64 = np.power(x.astype(np.float64), alpha) / np.power(largest.clip(_FLOOR), 1 - alpha)
    return powers.clip(_FLOOR)


@dataclass(frozen=True)
class SmoothedWeight:
    """A float16 weight with its input channels multiplied by the smoother; made when its codes are.

    Attributes:
        source: [out, in], floating, finite in float16.
        factor: the smoother, float64 [in].
        largest: magnitude of each smoothed row, float16 [out].
        pool: its threads share the work.
    """

    source: Array
    factor: Float64
    largest: Float16
    pool: Executor


def smooth_weight(source: Array, factor: Float64, pool: Executor) -> SmoothedWeight:
    """Multiply a weight [out, in] by the smoother.

    Raises:
        CheckpointError: if that leaves the range of float16.
    """
    largest = np.empty(len(source), np.float32)

    def measure(rows: slice) -> None:
        products = _products(source[rows], factor)
        largest[rows] = np.abs(products, out=products).max(axis=1)  # roundings keep the order

    _share(pool, measure, _row_blocks(source, _CACHED_ELEMENTS))
    if largest.max() >= _OVERFLOW:
        raise CheckpointError("smoothing takes weights out of float16's range", "lower sq_alpha")
    return SmoothedWeight(source, factor, largest.astype(np.float16), pool)


@dataclass(frozen=True)
class Codes:
    """An int8 matrix that is computed when numpy reads it as an array. Slices are views of it.

    A matrix is the largest object of a conversion, and it is written block by block.

    Attributes:
        source: [out, in], floating.
        factor: the smoother, float64 [in].
        scales: float32 [out, 1], by which smoothed rows are multiplied or divided.
        scaling: np.multiply or np.divide.
        dtype: smoothed weights are rounded to it.
        round_products: round to it again after that.
        pool: its threads share the work.
    """

    source: Array
    factor: Float64
    scales: Float32
    scaling: np.ufunc
    dtype: np.dtype[Any]
    round_products: bool
    pool: Executor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def ndim(self) -> int:
        return 2

    def __getitem__(self, key: slice | tuple[slice, slice]) -> Codes:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        return replace(self, source=self.source[rows, columns], factor=self.factor[columns], scales=self.scales[rows])

    def __array__(self, dtype: npt.DTypeLike = np.int8) -> Int8:
        codes = np.empty(self.shape, dtype)

        def fill(rows: slice) -> None:
            block = _products(self.source[rows], self.factor).astype(np.float32)
            _round(block, _FLOAT16)  # by way of float32, as torch does
            if self.dtype != _FLOAT16:
                _round(block, self.dtype)
            self.scaling(block, self.scales[rows], out=block)
            if self.round_products:
                _round(block, self.dtype)
            np.rint(block, out=block)
            codes[rows] = block.astype(np.int16).clip(-127, 127)  # in int16 five times faster than in float32

        _share(self.pool, fill, _row_blocks(self.source, _CACHED_ELEMENTS))
        return codes


def smooth_gain(gain: Float16, factor: Float64) -> Float16:
    """A norm's weight, float16 [in], divided by the smoother of the linear layers behind it.

    Channels that were never active in calibration have the smallest smoother; they stay finite.
    """
    limit = float(np.finfo(np.float16).max)
    return (gain / factor).clip(-limit, limit).astype(np.float32).astype(np.float16)


def quantize_linear(
    weight: SmoothedWeight, span: SmoothedRange, mode: SmoothQuantMode, dtype: np.dtype[Any]
) -> tuple[Codes, Float32]:
    """Quantize a linear layer other than qkv.

    Args:
        dtype: of the checkpoint: the weight is rounded to it before it is quantized.

    Returns:
        int8 [out, in] and `per_channel_scale`, float32 [1, out], or [1, 1] where the tensor shares it.
    """
    factors = _to_int8(weight.largest if mode.per_channel else weight.largest.max())
    scale = _scale(factors, span, mode).reshape(1, -1)
    return _codes(weight, factors, np.multiply, dtype, round_products=not mode.per_channel), scale


def quantize_qkv(
    weights: Sequence[SmoothedWeight], span: SmoothedRange, mode: SmoothQuantMode
) -> list[tuple[Codes, Float32]]:
    """Quantize the query, key and value projections, which share their input and output ranges.

    Returns:
        for each, int8 [out, in] and `per_channel_scale`, float32 [1, out]: one step a tensor is repeated.
    """
    results = []
    for weight in weights:
        if mode.per_channel:
            factors = _to_int8(weight.largest)
            codes = _codes(weight, factors, np.multiply, _FLOAT16, round_products=False)
        else:
            factors = np.full(len(weight.largest), _to_int8(weight.largest.max()))
            codes = _codes(weight, _inverse(factors), np.divide, _FLOAT16, round_products=True)
        results.append((codes, _scale(factors, span, mode)[None]))
    return results


def _codes(
    weight: SmoothedWeight, scales: Float16, scaling: np.ufunc, dtype: np.dtype[Any], *, round_products: bool
) -> Codes:
    column = np.broadcast_to(scales.astype(np.float32).reshape(-1, 1), (len(weight.source), 1))
    return Codes(weight.source, weight.factor, column, scaling, dtype, round_products, weight.pool)


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


def _largest_columns(weight: Array, pool: Executor) -> Array:
    """Largest magnitudes of the columns, in the weight's dtype: as integers, which order alike and compare faster."""
    signed, unsigned = (weight.view(f"{kind}{weight.itemsize}") for kind in "iu")
    magnitude = np.iinfo(signed.dtype).max

    def largest(rows: slice) -> Array:
        # Positive numbers lead as signed integers, negative ones as unsigned.
        positive: Array = signed[rows].max(axis=0)
        return np.maximum(positive, (unsigned[rows].max(axis=0) & magnitude).view(signed.dtype), out=positive)

    return reduce(np.maximum, pool.map(largest, _row_blocks(weight, _REDUCED_ELEMENTS))).view(weight.dtype)


def _products(source: Array, factor: Float64) -> Float64:
    """Weights, as float16 holds them, times the smoother."""
    block = source.astype(np.float32)
    if source.dtype != _FLOAT16:
        _round(block, _FLOAT16)
    return block * factor


def _round(block: Float32, dtype: np.dtype[Any]) -> None:
    """Round in place to the values of a 16-bit dtype, ties to even; they must lie within its range.

    The sum with 1.5 * 2^k has no bits below 2^(k - 23), so that adding and taking away a suitable power of two rounds
    there. numpy's own casts to float16 and back take seven times as long.
    """
    mantissa_bits, smallest = _FORMATS[dtype]
    exponents = (block.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    row = np.full(block.shape[1], smallest, np.float32)  # numpy's maximum is slower with a scalar
    shifts = np.maximum(exponents, row, out=exponents)
    shifts *= np.float32(1.5 * 2 ** (23 - mantissa_bits))
    block += shifts
    block -= shifts


def _share(pool: Executor, work: Callable[[slice], None], blocks: Iterable[slice]) -> None:
    """Process all blocks in parallel; raises the error of any block."""
    for _ in pool.map(work, blocks):
        pass


def _row_blocks(matrix: Array, elements: int) -> Iterator[slice]:
    count = max(1, elements // matrix.shape[1])
    for start in range(0, len(matrix), count):
        yield slice(start, start + count)

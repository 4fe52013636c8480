"""INT8 weight-only (W8A16): one symmetric scale for each output channel, in the layouts of TensorRT-LLM's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Int8 = npt.NDArray[np.int8]
Int8Layout = Literal["sm80", "sm90"]

# Of each 16 bytes along K, byte 2 i comes from place i and byte 2 i + 1 from place i + 8: the tensor core's order
# (0 1 8 9 2 3 10 11 ...) with bytes 1 and 2 of each word swapped, for the fast int8-to-half conversion.
_GROUP = 16
_TILE = 64
_BLOCK_ELEMENTS = 1 << 17  # quantized at a time: stays in a core's cache
_AWAY_FROM_ZERO = np.float32(1 - 2**-21)
_SMALL = 2.0**-100


def quantize(weight: Array, dtype: np.dtype[Any] | None = None) -> tuple[Int8, npt.NDArray[np.float32]]:
    """Quantize output channel by output channel.

    Formula of NVIDIA's quantizer: step = max|row| / 128 in float32; q = round half away from zero, to [-128, 127].
    The error is at most half a step, but up to a whole one for the largest positive values, which 127 cuts off.

    Args:
        weight: [out, in], floating; of 32-bit weights, what is within 2^-21 of a tie may be rounded as one.
        dtype: the checkpoint's 16-bit dtype, to which weights are rounded first; None is the weight's own.

    Returns:
        q, int8 [out, in], and the steps, float32 [out].
    """
    steps = np.empty(len(weight), np.float32)
    quantized = np.empty(weight.shape, np.int8)
    for rows in _row_blocks(weight):
        block, largest = _rounded(weight[rows], dtype or weight.dtype)
        steps[rows] = largest * np.float32(1 / 128)
        # Dividing by a little less turns ties away from zero. No other quotient of two 16-bit floats crosses its tie:
        # with mantissas of 11 bits they differ by more than 2^-19 of their size.
        if (small := (largest > 0) & (largest < _SMALL)).any():  # a subnormal divisor would be rounded too coarsely
            grown = np.where(small, np.float32(2**64), np.float32(1))
            block, largest = block * grown[:, None], largest * grown
        divisors = np.where(largest > 0, largest * np.float32(1 / 128) * _AWAY_FROM_ZERO, np.float32(1))
        np.divide(block, divisors[:, None], out=block)
        np.rint(block, out=block)
        quantized[rows] = np.minimum(block.astype(np.int32), 127)
    return quantized, steps


def _rounded(weight: Array, dtype: np.dtype[Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A block of rows rounded to `dtype`, as float32, and the largest magnitude of each row."""
    block = weight.astype(np.float32)
    largest = np.abs(np.maximum(block.max(axis=1), -block.min(axis=1)))  # abs: no step is -0
    if dtype == weight.dtype:
        return block, largest
    # float16 holds every bfloat16 from 2^-17 to 65280 exactly, and what is smaller becomes 0 in rows that reach 2^-8.
    exact = weight.dtype.name == "bfloat16" and dtype == np.float16
    if exact and largest.max() < 65536 and (largest[largest > 0] > 2**-8).all():
        return block, largest
    block = weight.astype(dtype).astype(np.float32)
    return block, np.abs(block).max(axis=1)


def dequantize(quantized: Int8, steps: Array) -> npt.NDArray[np.float32]:
    """float32 [out, in] of int8 [out, in] and steps [out]."""
    return quantized.astype(np.float32) * np.asarray(steps, np.float32)[:, None]


def to_layout(quantized: Int8, layout: Int8Layout) -> Int8:
    """The bytes that the mixed GEMM reads: int8 [in, out] in name, permuted in fact.

    Steps (cutlass_preprocessors.cpp of TensorRT-LLM 1.x): order rows of K in groups of 16; column major; on SM80
    interleave pairs of columns in tiles of 64; add 128; swap bytes 1 and 2 of each word.

    Args:
        quantized: int8 [out, in]; in a multiple of 64, out of 2.
    """
    out, inner = quantized.shape
    stored = np.empty((out, inner), np.uint8)  # column major [K, N] is row major [N, K]
    for rows in _row_blocks(quantized):
        block = (quantized[rows].view(np.uint8) ^ 0x80).reshape(-1, inner // _GROUP, 2, _GROUP // 2)
        words = stored[rows].reshape(len(block), inner // _GROUP, _GROUP // 2, 2)
        for half, place in np.ndindex(2, _GROUP // 2):
            words[:, :, place, half] = block[:, :, half, place]
        if layout == "sm80":
            tiles = words.reshape(len(block) // 2, 2, inner // _TILE, _TILE)
            words.reshape(-1)[:] = tiles.transpose(0, 2, 1, 3).reshape(-1)
    return stored.view(np.int8).reshape(inner, out)


def quantize_to_layout(
    weight: Array, layout: Int8Layout, dtype: np.dtype[Any] | None = None
) -> tuple[Int8, npt.NDArray[np.float32]]:
    """`quantize` and `to_layout` in one go, while each block of rows is in a core's cache."""
    out, inner = weight.shape
    stored, steps = np.empty((out, inner), np.int8), np.empty(out, np.float32)
    for rows in _row_blocks(weight):
        quantized, steps[rows] = quantize(weight[rows], dtype)
        stored[rows] = to_layout(quantized, layout).reshape(-1, inner)
    return stored.reshape(inner, out), steps


def from_layout(stored: Int8, layout: Int8Layout) -> Int8:
    """int8 [out, in] of what `to_layout` wrote, [in, out]."""
    inner, out = stored.shape
    words = np.ascontiguousarray(stored).view(np.uint8)
    if layout == "sm80":
        words = words.reshape(out // 2, inner // _TILE, 2, _TILE).transpose(0, 2, 1, 3)
    columns = words.reshape(out, inner // _GROUP, _GROUP // 2, 2).swapaxes(2, 3).reshape(out, inner)
    return (columns ^ 0x80).view(np.int8)


def _row_blocks(matrix: Array) -> Iterator[slice]:
    """Slices of rows, an even number in each."""
    count = max(2, _BLOCK_ELEMENTS // matrix.shape[1] // 2 * 2)
    for start in range(0, len(matrix), count):
        yield slice(start, start + count)

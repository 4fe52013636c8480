"""INT8 weight-only (W8A16): one symmetric scale for each output channel, in the layouts of TensorRT-LLM's kernels."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Int8 = npt.NDArray[np.int8]
Int8Layout = Literal["sm80", "sm90"]

# The kernels load 16 rows of K at a time; the tensor core wants them in this order.
_ROW_ORDER = np.array([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
_BYTE_ORDER = np.array([0, 2, 1, 3])  # of each 4-byte word, for the fast int8-to-half conversion
_TILE = 64
_BLOCK_ROWS = 1024


def quantize(weight: Array) -> tuple[Int8, npt.NDArray[np.float32]]:
    """Quantise output channel by output channel; the error is at most half a step.

    Formula of NVIDIA's quantiser: step = max|row| / 128 in float32; q = round half away from zero, to [-128, 127].

    Args:
        weight: [out, in], any floating dtype.

    Returns:
        q, int8 [out, in], and the steps, float32 [out].
    """
    steps = np.empty(len(weight), np.float32)
    quantized = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        block = weight[rows].astype(np.float32)
        steps[rows] = np.abs(block).max(axis=1, initial=0) * np.float32(1 / 128)
        scaled = np.divide(block, steps[rows, None], out=np.zeros_like(block), where=steps[rows, None] > 0)
        np.trunc(scaled + np.copysign(np.float32(0.5), scaled), out=scaled)
        quantized[rows] = scaled.clip(-128, 127)
    return quantized, steps


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
    columns = quantized.reshape(out, inner // 16, 16)[:, :, _ROW_ORDER]  # column major [K, N] is row major [N, K]
    if layout == "sm80":
        columns = columns.reshape(out // 2, 2, inner // _TILE, _TILE).transpose(0, 2, 1, 3)
    words = (np.ascontiguousarray(columns).view(np.uint8) ^ 0x80).reshape(-1, 4)
    return words[:, _BYTE_ORDER].view(np.int8).reshape(inner, out)


def from_layout(stored: Int8, layout: Int8Layout) -> Int8:
    """int8 [out, in] of what `to_layout` wrote, [in, out]."""
    inner, out = stored.shape
    words = np.ascontiguousarray(stored).view(np.uint8).reshape(-1, 4)[:, _BYTE_ORDER] ^ 0x80
    columns = words.view(np.int8)
    if layout == "sm80":
        columns = columns.reshape(out // 2, inner // _TILE, 2, _TILE).transpose(0, 2, 1, 3)
    restored = np.empty((out, inner // 16, 16), np.int8)
    restored[:, :, _ROW_ORDER] = columns.reshape(out, inner // 16, 16)
    return restored.reshape(out, inner)

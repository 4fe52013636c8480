"""Matrix products with INT8 weights, read in place: a quarter of the bytes of float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trtqwen.executor.cpu.jit import compiled, widen


@compiled()
def _two_columns(rows: Any, weight: Any, scale: Any, output: Any, column: int, other: int) -> None:
    """Two columns of the output, which may be the same: four rows share what is loaded of the weights."""
    first, second = weight[column], weight[other]
    count, size = rows.shape
    row = 0
    while row + 4 <= count:
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        for i in range(size):
            a, b = widen(first[i]), widen(second[i])
            a0 += rows[row, i] * a
            a1 += rows[row + 1, i] * a
            a2 += rows[row + 2, i] * a
            a3 += rows[row + 3, i] * a
            b0 += rows[row, i] * b
            b1 += rows[row + 1, i] * b
            b2 += rows[row + 2, i] * b
            b3 += rows[row + 3, i] * b
        output[row, column], output[row, other] = a0 * scale[column], b0 * scale[other]
        output[row + 1, column], output[row + 1, other] = a1 * scale[column], b1 * scale[other]
        output[row + 2, column], output[row + 2, other] = a2 * scale[column], b2 * scale[other]
        output[row + 3, column], output[row + 3, other] = a3 * scale[column], b3 * scale[other]
        row += 4
    while row < count:
        a0 = b0 = np.float32(0)
        for i in range(size):
            a0 += rows[row, i] * widen(first[i])
            b0 += rows[row, i] * widen(second[i])
        output[row, column], output[row, other] = a0 * scale[column], b0 * scale[other]
        row += 1


@compiled(parallel=True, nogil=True)
def int8_matmul(rows: Any, weight: Any, scale: Any, output: Any) -> None:
    """output = (rows @ weight.T) * scale.

    Args:
        rows: float32 [n, in].
        weight: int8 [out, in].
        scale: float32 [out].
        output: float32 [n, out].
    """
    columns = weight.shape[0]
    for pair in prange((columns + 1) // 2):
        _two_columns(rows, weight, scale, output, 2 * pair, min(2 * pair + 1, columns - 1))

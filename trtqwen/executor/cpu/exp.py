"""The exponential function of the CPU kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from trtqwen.executor.cpu.jit import compiled

COLDEST = np.float32(-87.0)  # exp of less is a subnormal float32
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@compiled(inline="always")
def exp(x: Any) -> Any:
    """exp for x <= 0, error 1e-7: the polynomial of Cephes' expf, so that the loop around it becomes vector code."""
    x = max(x, COLDEST)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)

"""Residual sum, RMS norm and, for INT8, quantization in one pass over a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import begin, chained
from trtqwen.executor.cuda.kernels.quantize import Quantization, Quantized, quantize_row


@triton.jit
def _add_norm(
    hidden,
    delta,
    gain,
    out,
    steps,
    width,
    epsilon,
    to_int,
    HAS_DELTA: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = hidden + row * width + columns
    values = tl.load(place, mask=inside, other=0.0)
    kind: tl.constexpr = hidden.dtype.element_ty
    if HAS_DELTA:
        added = tl.load(delta + row * width + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(kind)
        tl.store(place, values, mask=inside)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    normed = (wide * scale).to(kind).to(tl.float32) * tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(kind)
    if MODE == 0:
        tl.store(out + row * width + columns, normed, mask=inside)
    else:
        quantize_row(normed.to(tl.float32), out + row * width + columns, inside, steps + row, to_int, MODE)


def add_norm(
    hidden: Tensor, delta: Tensor | None, gain: Tensor, epsilon: float, quantization: Quantization | None
) -> Tensor | Quantized:
    """`hidden += delta; return rms_norm(hidden, gain)`, see `nn.ops.rms_norm`; quantized if the reader asks for it.

    Args:
        hidden: [rows, width]; changed in place.
    """
    rows, width = hidden.shape
    mode = 0 if quantization is None else quantization.mode
    out = torch.empty_like(hidden) if quantization is None else torch.empty_like(hidden, dtype=torch.int8)
    steps = torch.empty(rows, dtype=torch.float32, device=hidden.device) if mode == 1 else hidden
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        hidden,
        delta if delta is not None else hidden,
        gain,
        out,
        steps,
        width,
        epsilon,
        1.0 if quantization is None else quantization.to_int,
        HAS_DELTA=delta is not None,
        MODE=mode,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **chained(rows),
    )
    return out if quantization is None else Quantized(out, steps if mode == 1 else None)

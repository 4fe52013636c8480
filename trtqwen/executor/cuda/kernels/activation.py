"""silu(gate) * up, quantized for INT8 in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import begin, chained
from trtqwen.executor.cuda.kernels.quantize import PER_TOKEN, Quantization, Quantized, round_to_int8


@triton.jit
def _silu_mul_tile(gate_up, row, columns, inside, width):
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (active * up).to(gate.dtype)


@triton.jit
def _silu_mul(
    gate_up,
    out,
    width,
    to_int,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = _silu_mul_tile(gate_up, row, columns, inside, width)
    if QUANTIZE:
        tl.store(out + row * width + columns, round_to_int8(values.to(tl.float32) * to_int), mask=inside)
    else:
        tl.store(out + row * width + columns, values, mask=inside)


@triton.jit
def _silu_mul_row(
    gate_up,
    out,
    steps,
    width,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    # The row stays in registers between its largest value and its codes, in two pieces that waste few lanes.
    columns = tl.arange(0, FIRST)
    values = _silu_mul_tile(gate_up, row, columns, columns < width, width).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12)
    if REST:
        others = FIRST + tl.arange(0, REST)
        more = _silu_mul_tile(gate_up, row, others, others < width, width).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(more), axis=0))
        tl.store(out + row * width + others, round_to_int8(more * (127.0 / largest)), mask=others < width)
    tl.store(steps + row, largest / 127.0)
    tl.store(out + row * width + columns, round_to_int8(values * (127.0 / largest)))


def silu_mul(gate_up: Tensor, quantization: Quantization | None) -> Tensor | Quantized:
    """`silu(gate_up[:, :width]) * gate_up[:, width:]`, [rows, width]; quantized if the reader asks for it.

    Args:
        quantization: without a smoother, see `linear.fold_smoother`; or None.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    dtype = gate_up.dtype if quantization is None else torch.int8
    out = torch.empty((rows, width), dtype=dtype, device=gate_up.device)
    assert quantization is None or quantization.inverse_smoother is None
    if quantization is not None and quantization.mode == PER_TOKEN:
        steps = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
        first = 1 << (width.bit_length() - 1)
        _silu_mul_row[(rows,)](
            gate_up,
            out,
            steps,
            width,
            FIRST=first,
            REST=triton.next_power_of_2(width - first) if width > first else 0,
            num_warps=min(32, max(1, first // 512)),
            **chained(rows),
        )
        return Quantized(out, steps)
    block = 1024
    _silu_mul[(rows, triton.cdiv(width, block))](
        gate_up,
        out,
        width,
        1.0 if quantization is None else quantization.to_int,
        QUANTIZE=quantization is not None,
        BLOCK=block,
        num_warps=4,
        **chained(rows),
    )
    return out if quantization is None else Quantized(out, None)

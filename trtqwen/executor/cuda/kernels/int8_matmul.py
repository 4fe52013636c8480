"""Matrix products with INT8 weights: times INT8 activations (W8A8), and times 16-bit ones (W8A16)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.gemv import gemv
from trtqwen.executor.cuda.kernels.matmul import few_rows_product
from trtqwen.executor.cuda.kernels.quantize import Quantized
from trtqwen.executor.cuda.kernels.tiles import place_of
from trtqwen.executor.cuda.kernels.w8a8_row import w8a8_row
from trtqwen.executor.cuda.kernels.w8a8_wide import w8a8_wide, wide_tile

# Beyond this many rows a W8A16 product is slower than dequantizing the matrix once for cuBLAS (H100, gate+up of 7B:
# 200 us against 126 + 165 at 256 rows, 1367 against 846 + 165 at 2048).
MOST_FUSED_ROWS = 384


@triton.jit(do_not_specialize=["rows"])
def _w8a8(
    codes,
    weight,
    steps,
    scales,
    bias,
    out,
    rows,
    columns,
    width,
    PER_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = place_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    offsets = tl.arange(0, BLOCK)
    left = codes + (row % rows).to(tl.int64)[:, None] * width + offsets[None, :]
    right = weight + (column % columns).to(tl.int64)[None, :] * width + offsets[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, width, BLOCK):
        if EVEN:
            part = tl.load(left)
            tile = tl.load(right)
        else:
            part = tl.load(left, mask=(start + offsets < width)[None, :], other=0)
            tile = tl.load(right, mask=(start + offsets < width)[:, None], other=0)
        total = tl.dot(part, tile, total, out_dtype=tl.int32)
        left += BLOCK
        right += BLOCK
    result = total.to(tl.float32) * tl.load(scales + column, mask=column < columns, other=0.0)[None, :]
    if PER_TOKEN:
        result *= tl.load(steps + row, mask=row < rows, other=0.0)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    exists = (row < rows)[:, None] & (column < columns)[None, :]
    place = out + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=exists)


def w8a8_tile(rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile, warps and stages; the fastest of those tried on an H100."""
    wide = columns >= 8192
    if rows <= 16:
        return (16, 64, 256, 4, 4) if wide else (16, 32, 512, 4, 3)
    if rows <= 128:
        return (64, 64, 128, 4, 4) if wide else (64, 64, 256, 4, 3)
    if rows <= 384:
        return (64, 128, 128, 4, 3) if wide else (64, 64, 256, 4, 3)
    return 128, 128, 128, 8, 3


def w8a8(
    hidden: Quantized,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """`(codes @ weight.T) * scales * steps + bias`, the sum exact in int32, [rows, columns] of `dtype`.

    Args:
        weight: int8 [columns, width].
        scales: float32 [columns], the activations' calibrated step included where they have one.
        bias: float32 [columns].
    """
    codes, steps = hidden.codes, hidden.steps
    rows, width = codes.shape
    columns = len(weight)
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if rows == 1 and tile is None:
        w8a8_row(codes, weight, steps, scales, bias, out)
        return out
    wide = wide_tile(rows, columns, width) if tile is None else None
    if wide is not None:
        w8a8_wide(codes, weight, steps, scales, bias, out, wide)
        return out
    own_rows, own_columns, block, warps, stages = tile or w8a8_tile(rows, columns)
    _w8a8[(triton.cdiv(rows, own_rows) * triton.cdiv(columns, own_columns),)](
        codes,
        weight,
        steps if steps is not None else scales,
        scales,
        bias if bias is not None else scales,
        out,
        rows,
        columns,
        width,
        PER_TOKEN=steps is not None,
        HAS_BIAS=bias is not None,
        EVEN=width % block == 0,
        ROWS=own_rows,
        COLUMNS=own_columns,
        BLOCK=block,
        GROUP=8,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def w8a16_tile(rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile, warps and stages."""
    if rows <= 16:
        return 16, 32, 512, 4, 3
    if rows <= 128 or columns < 8192:
        return 64, 64, 128, 4, 3
    return 128, 128, 64, 8, 3


def w8a16(hidden: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """`hidden @ (weight * scales).T + bias`: dequantized inside the kernel for few rows, once for many.

    Args:
        hidden: [rows, width] of a 16-bit dtype.
        weight: int8 [columns, width].
        scales: float32 [columns].
        scratch: a buffer in the dtype of `hidden` that holds the matrix.
    """
    rows = len(hidden)
    if rows == 1:
        return gemv(hidden, weight, hidden.dtype, scales=scales, bias=bias)
    if rows > MOST_FUSED_ROWS:
        whole = scratch[: weight.numel()].view(weight.shape)
        torch.mul(weight, scales[:, None].to(hidden.dtype), out=whole)
        return F.linear(hidden, whole, bias)
    out = torch.empty((rows, len(weight)), dtype=hidden.dtype, device=hidden.device)
    own_rows, *tile = w8a16_tile(rows, len(weight))
    few_rows_product(hidden, weight, scales, bias, out, (tile[0], tile[1], tile[2], tile[3]), own_rows)
    return out

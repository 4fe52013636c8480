"""16-bit matrix products of few rows, which read the weights once at the memory's speed. cuBLAS does the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import begin, chained
from trtqwen.executor.cuda.kernels.gemv import gemv

FEW_ROWS = 16


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    hidden,
    weight,
    bias,
    scales,
    out,
    rows,
    columns,
    width,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin(CHAINED)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = tl.arange(0, BLOCK)
    left = hidden + row[:, None] * width + offsets[None, :]
    right = weight + column.to(tl.int64)[None, :] * width + offsets[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + offsets < width
        part = tl.load(left + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        tile = tl.load(right + start, mask=(column < columns)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(part, tile.to(part.dtype), total)
    if SCALED:
        total *= tl.load(scales + column, mask=column < columns, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    exists = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * columns + column[None, :], total.to(out.dtype.element_ty), mask=exists)


def few_rows_tile(columns: int) -> tuple[int, int, int, int]:
    """Columns of a program, elements of the sum at a time, warps and stages, for up to 16 input rows."""
    return (32, 256, 4, 4) if columns < 8192 else (64, 128, 4, 4)


def matmul(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias`, [rows, columns], in the dtype of `hidden`.

    Args:
        hidden: [rows, width].
        weight: [columns, width], of the same dtype.
    """
    rows, columns = len(hidden), len(weight)
    if rows > FEW_ROWS or hidden.dtype == torch.float32:
        return F.linear(hidden, weight, bias)
    if rows == 1:
        return gemv(hidden, weight, hidden.dtype, bias=bias)
    out = torch.empty((rows, columns), dtype=hidden.dtype, device=hidden.device)
    few_rows_product(hidden, weight, None, bias, out, few_rows_tile(columns))
    return out


def few_rows_product(
    hidden: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tile: tuple[int, int, int, int],
    rows_of_tile: int = FEW_ROWS,
) -> None:
    """`(hidden @ weight.T) * scales + bias` into `out`; integer weights become the dtype of `hidden` in registers."""
    rows, width = hidden.shape
    columns = len(weight)
    own_columns, block, warps, stages = tile
    _few_rows[(triton.cdiv(columns, own_columns), triton.cdiv(rows, rows_of_tile))](
        hidden,
        weight,
        bias if bias is not None else hidden,
        scales if scales is not None else hidden,
        out,
        rows,
        columns,
        width,
        HAS_BIAS=bias is not None,
        SCALED=scales is not None,
        ROWS=rows_of_tile,
        COLUMNS=own_columns,
        BLOCK=block,
        num_warps=warps,
        num_stages=stages,
        **chained(rows),
    )

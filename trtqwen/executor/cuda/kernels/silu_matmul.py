"""The gate and up matrices of an MLP and silu(gate) * up in one kernel, for steps of many prompt tokens.

cuBLAS multiplies a little faster, but its products of 16,384 tokens of a 7B model are 1.2 GB that SiLU reads again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trtqwen.executor.cuda.kernels.tiles import has_accelerator, place_of, processors

MANY_ROWS = 12288  # on an H100 6.4 against 6.9 ms at 16,384 tokens; at 8,192, 3.8 against 3.5 ms


@triton.jit(do_not_specialize=["rows"])
def _silu_matmul(
    hidden,
    weight,
    out,
    rows,
    columns,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = place_of(tile, row_tiles, column_tiles, GROUP)
        row_begin, column_begin = row_tile * ROWS, column_tile * COLUMNS
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for block in range(tl.cdiv(width, BLOCK)):
            part = hidden.load([row_begin, block * BLOCK])
            gate = tl.dot(part, weight.load([column_begin, block * BLOCK]).T, gate)
            up = tl.dot(part, weight.load([columns + column_begin, block * BLOCK]).T, up)
        # Rounded where two kernels would: the answers stay the same, however long the step is.
        dtype = out.dtype.element_ty
        wide = gate.to(dtype).to(tl.float32)
        active = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        row = row_begin + tl.arange(0, ROWS)
        column = column_begin + tl.arange(0, COLUMNS)
        place = out + row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(place, active.to(dtype), mask=(row < rows)[:, None] & (column < columns)[None, :])


def pays(hidden: Tensor) -> bool:
    """Whether this kernel is faster than cuBLAS and `silu_mul`, and works: the descriptors want rows of 16 bytes."""
    return (
        len(hidden) >= MANY_ROWS
        and hidden.dtype in (torch.float16, torch.bfloat16)
        and hidden.shape[1] % 8 == 0
        and has_accelerator()
    )


def silu_matmul(
    hidden: Tensor, weight: Tensor, tile: tuple[int, int, int, int, int] = (128, 128, 64, 8, 3)
) -> Tensor:
    """`silu(hidden @ gate.T) * (hidden @ up.T)`, [rows, columns], in the dtype of `hidden`.

    Args:
        hidden: [rows, width].
        weight: [2 * columns, width], gate and then up.
        tile: rows, columns and depth of a tile, warps and stages.
    """
    rows, width = hidden.shape
    columns = len(weight) // 2
    own_rows, own_columns, block, warps, stages = tile
    programs = processors(hidden.device)
    out = torch.empty((rows, columns), dtype=hidden.dtype, device=hidden.device)
    _silu_matmul[(min(programs, triton.cdiv(rows, own_rows) * triton.cdiv(columns, own_columns)),)](
        TensorDescriptor.from_tensor(hidden, [own_rows, block]),
        TensorDescriptor.from_tensor(weight, [own_columns, block]),
        out,
        rows,
        columns,
        width,
        ROWS=own_rows,
        COLUMNS=own_columns,
        BLOCK=block,
        GROUP=8,
        PROGRAMS=programs,
        num_warps=warps,
        num_stages=stages,
    )
    return out

"""W8A8 products of one row, without tensor cores: integers are multiplied at the memory's speed.

A tile of the tensor cores has 16 rows, and its programs take room from the kernel before when they wait for it. On an
H200 the products of a layer of a 7B model took 106 us in tiles, and take 74.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import announce, chained, wait
from trtqwen.executor.cuda.kernels.fold import LOAD_BYTES, fold

# Columns of a program, bytes of a column at a time, warps. The fastest of 12 for a 7B model on an H200.
_LARGE, _SMALL = (8, 512, 4), (4, 2048, 4)


@triton.jit
def _w8a8_row(
    codes,
    weight,
    steps,
    scales,
    bias,
    out,
    columns,
    PER_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    announce(CHAINED)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    offsets = tl.arange(0, BLOCK)
    place = weight + column.to(tl.int64)[:, None] * WIDTH
    tile = tl.load(
        place + offsets[None, :],
        mask=exists[:, None] & (offsets < WIDTH)[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    wait(CHAINED)
    sums = tl.zeros((COLUMNS, BLOCK // GROUP), tl.int32)
    for start in range(0, WIDTH, BLOCK):
        position = start + offsets
        part = tl.load(codes + position, mask=position < WIDTH, other=0)
        following = position + BLOCK
        more = exists[:, None] & (following < WIDTH)[None, :]
        sums += fold(tile.to(tl.int32) * part.to(tl.int32)[None, :], COLUMNS, BLOCK, GROUP)
        tile = tl.load(place + following[None, :], mask=more, other=0, eviction_policy="evict_first")
    result = tl.sum(sums, axis=1).to(tl.float32) * tl.load(scales + column, mask=exists, other=0.0)
    if PER_TOKEN:
        result *= tl.load(steps)
    if HAS_BIAS:
        result += tl.load(bias + column, mask=exists, other=0.0)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=exists)


def w8a8_row(
    codes: Tensor, weight: Tensor, steps: Tensor | None, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """`(codes @ weight.T) * scales * steps + bias` of one row into `out`; see `int8_matmul.w8a8`."""
    columns, width = weight.shape
    per_program, piece, warps = _LARGE if columns >= 8192 else _SMALL
    _w8a8_row[(triton.cdiv(columns, per_program),)](
        codes,
        weight,
        steps if steps is not None else scales,
        scales,
        bias if bias is not None else scales,
        out,
        columns,
        PER_TOKEN=steps is not None,
        HAS_BIAS=bias is not None,
        COLUMNS=per_program,
        WIDTH=width,
        BLOCK=piece,
        GROUP=LOAD_BYTES,
        num_warps=warps,
        **chained(1),
    )

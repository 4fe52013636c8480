"""Matrix times one vector, at the memory's speed: one program reads a few rows of the matrix.

The norm before it and the activation or the sum after it are done on the way, so that a layer of one token is five
kernels. The first weights are read before the kernel waits for the one before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import announce, chained, wait
from trtqwen.executor.cuda.kernels.fold import LOAD_BYTES, fold

# Rows of a program, bytes of a row at a time, warps. The fastest of 13 for a 7B model on an H200.
_LARGE, _SMALL = (2, 2048, 4), (4, 4096, 8)
_SMALL_BYTES = 64 << 20


@triton.jit
def _scale_and_add(total, row, exists, scales, bias, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr):
    if SCALED:
        total *= tl.load(scales + row, mask=exists, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=exists, other=0.0).to(tl.float32)
    return total


@triton.jit
def _gemv(
    vector,
    weight,
    gain,
    scales,
    bias,
    residual,
    out,
    columns,
    epsilon,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    announce(CHAINED)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < columns
    place = weight + row.to(tl.int64)[:, None] * WIDTH
    offsets = tl.arange(0, BLOCK)
    place_up = place + tl.cast(columns, tl.int64) * WIDTH
    first = exists[:, None] & (offsets < WIDTH)[None, :]
    tile = tl.load(place + offsets[None, :], mask=first, other=0, eviction_policy="evict_first")
    up = tile
    if SILU:
        up = tl.load(place_up + offsets[None, :], mask=first, other=0, eviction_policy="evict_first")
    wait(CHAINED)
    sums = tl.zeros((ROWS, BLOCK // GROUP), tl.float32)
    sums_up = tl.zeros((ROWS, BLOCK // GROUP), tl.float32)
    squares = tl.zeros((BLOCK // GROUP,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        position = start + offsets
        part = tl.load(vector + position, mask=position < WIDTH, other=0).to(tl.float32)
        if NORM:
            # As a matrix of one row, for `fold`, it takes 8 to 14 registers more.
            squares += tl.sum(tl.reshape(part * part, (BLOCK // GROUP, GROUP)), axis=1)
            part *= tl.load(gain + position, mask=position < WIDTH, other=0).to(tl.float32)
        following = position + BLOCK
        more = exists[:, None] & (following < WIDTH)[None, :]
        sums += fold(tile.to(tl.float32) * part[None, :], ROWS, BLOCK, GROUP)
        tile = tl.load(place + following[None, :], mask=more, other=0, eviction_policy="evict_first")
        if SILU:
            sums_up += fold(up.to(tl.float32) * part[None, :], ROWS, BLOCK, GROUP)
            up = tl.load(place_up + following[None, :], mask=more, other=0, eviction_policy="evict_first")
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + epsilon)
    kind: tl.constexpr = out.dtype.element_ty
    total = _scale_and_add(tl.sum(sums, axis=1) * factor, row, exists, scales, bias, SCALED, HAS_BIAS)
    if SILU:
        total_up = tl.sum(sums_up, axis=1) * factor
        total_up = _scale_and_add(total_up, row, exists, scales + columns, bias + columns, SCALED, HAS_BIAS)
        total = (total / (1.0 + tl.exp(-total))).to(kind).to(tl.float32) * total_up.to(kind).to(tl.float32)
    if RESIDUAL:
        total = total.to(kind).to(tl.float32) + tl.load(residual + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(kind), mask=exists)


def gemv(
    vector: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    *,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    epsilon: float = 0.0,
    silu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`weight @ vector * scales + bias`, [1, rows] of `dtype`.

    Args:
        vector: [1, width].
        weight: [rows, width], floating or int8.
        scales: float32 [rows].
        gain: norm the vector first, `nn.ops.rms_norm`, with this gain.
        silu: the first half of the rows goes through SiLU and multiplies the second: [1, rows / 2].
        residual: [1, rows], gets the result added, in place, and is returned.
    """
    columns = len(weight) // 2 if silu else len(weight)
    out = residual if residual is not None else torch.empty((1, columns), dtype=dtype, device=vector.device)
    rows, piece, warps = _LARGE if weight.numel() * weight.itemsize > _SMALL_BYTES else _SMALL
    _gemv[(triton.cdiv(columns, rows),)](
        vector,
        weight,
        gain if gain is not None else weight,
        scales if scales is not None else weight,
        bias if bias is not None else weight,
        out,
        out,
        columns,
        epsilon,
        NORM=gain is not None,
        SILU=silu,
        SCALED=scales is not None,
        HAS_BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ROWS=rows,
        WIDTH=vector.shape[1],
        BLOCK=piece // weight.itemsize,
        GROUP=LOAD_BYTES // weight.itemsize,
        num_warps=warps,
        **chained(1),
    )
    return out

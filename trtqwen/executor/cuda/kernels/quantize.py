"""Quantization of activations to INT8, with each token's own range or with a calibrated one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtqwen.executor.cuda.kernels.chain import begin, chained

PER_TOKEN, STATIC = 1, 2


@dataclass(frozen=True)
class Quantization:
    """The input quantization of a linear layer.

    Attributes:
        mode: `PER_TOKEN` or `STATIC`.
        to_int: factor from the input to its code, for `STATIC`.
        inverse_smoother: float32 [in], multiplies the input first, where no norm has done so; or None.
    """

    mode: int
    to_int: float = 1.0
    inverse_smoother: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """A quantized activation.

    Attributes:
        codes: int8 [rows, in].
        steps: float32 [rows], or None where the scale is calibrated.
    """

    codes: Tensor
    steps: Tensor | None

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Tensor) -> Quantized:
        return Quantized(self.codes[rows], None if self.steps is None else self.steps[rows])


@triton.jit
def round_to_int8(values):
    """Round half to even, as torch.round does, and clamp."""
    values = tl.minimum(tl.maximum(values, -128.0), 127.0)
    magic = 12582912.0  # 1.5 * 2**23: the sum has no fraction bits left
    return (values + magic - magic).to(tl.int8)


@triton.jit
def quantize_row(values, place, inside, step_place, to_int, MODE: tl.constexpr):
    """Quantize a whole row that one program holds, float32; masked values are 0."""
    if MODE == 1:
        largest = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12)
        tl.store(step_place, largest / 127.0)
        codes = round_to_int8(values * (127.0 / largest))
    else:
        codes = round_to_int8(values * to_int)
    tl.store(place, codes, mask=inside)


@triton.jit
def _quantize(
    hidden,
    smoother,
    out,
    steps,
    width,
    to_int,
    SMOOTH: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(hidden + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        values *= tl.load(smoother + columns, mask=inside, other=0.0)
    quantize_row(values, out + row * width + columns, inside, steps + row, to_int, MODE)


def quantize_rows(hidden: Tensor, how: Quantization) -> Quantized:
    """Quantize [rows, width] by each row's range (codes = round(x / (max|x| / 127))) or by `how.to_int`."""
    rows, width = hidden.shape
    codes = torch.empty_like(hidden, dtype=torch.int8)
    steps = torch.empty(rows, dtype=torch.float32, device=hidden.device) if how.mode == PER_TOKEN else hidden
    block = triton.next_power_of_2(width)
    _quantize[(rows,)](
        hidden,
        how.inverse_smoother if how.inverse_smoother is not None else hidden,
        codes,
        steps,
        width,
        how.to_int,
        SMOOTH=how.inverse_smoother is not None,
        MODE=how.mode,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **chained(rows),
    )
    return Quantized(codes, steps if how.mode == PER_TOKEN else None)

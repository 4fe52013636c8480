"""The linear layers of the CPU against the formulas that they stand for."""

from __future__ import annotations

import pytest
import torch

from trtqwen.executor.linear import FloatLinear, PackedLinear, SmoothQuantLinear, multiply_int8

ROWS = [1, 3, 4, 9, 200]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_multiplies_like_a_plain_one(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, bias, hidden = torch.randn(33, 48).to(dtype), torch.randn(33).to(dtype), torch.randn(rows, 48).to(dtype)
    for offset in (bias, None):
        expected = FloatLinear(weight, offset)(hidden)
        torch.testing.assert_close(PackedLinear(weight, offset)(hidden), expected, atol=1e-4, rtol=2e-2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_int8_weights_are_multiplied_as_they_lie(rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randint(-128, 128, (columns, 37), dtype=torch.int8)
    hidden, scale = torch.randn(rows, 37), torch.rand(columns) + 0.1
    expected = (hidden.double() @ weight.double().T * scale.double()).float()
    torch.testing.assert_close(multiply_int8(hidden, weight, scale), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_smoothquant_gives_the_same_from_int8_and_from_float(per_channel: bool, static: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (20, 32), dtype=torch.int8)
    scale = torch.rand(1, 20 if per_channel else 1)
    fixed = (torch.tensor([9.0]), torch.tensor([0.5])) if static else (None, None)
    hidden = torch.randn(5, 32)
    layers = [SmoothQuantLinear(w, scale, torch.randn(20).zero_(), None, *fixed) for w in (weight, weight.float())]
    torch.testing.assert_close(layers[0](hidden), layers[1](hidden), atol=1e-4, rtol=1e-4)


def test_a_packed_matrix_multiplies_on_in_one_pass() -> None:
    torch.manual_seed(0)
    weight, hidden, factor = torch.randn(40, 48), torch.randn(5, 48), torch.randn(5, 40)
    packed, product = PackedLinear(weight, None), hidden @ weight.T
    torch.testing.assert_close(packed.silu(hidden), torch.nn.functional.silu(product), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed.times(hidden, factor), product * factor, atol=1e-4, rtol=1e-4)

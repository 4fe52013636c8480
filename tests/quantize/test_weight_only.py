"""INT8 weight-only against its formula in exact arithmetic, and the layouts against their published steps."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.models import random_model
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.quantize.weight_only import (
    Array,
    Int8Layout,
    dequantize,
    from_layout,
    quantize,
    quantize_to_layout,
    to_layout,
)
from trtqwen.recipe import CheckpointRecipe

FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
LAYOUTS: tuple[Int8Layout, ...] = ("sm80", "sm90")
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-38, 1e-7, 1e-6, 1e-4, 0.02, 1.0, 300.0])


def random_weight(seed: int, rows: int, columns: int, scale: float, dtype: np.dtype[np.generic]) -> Array:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * scale
    values[0] = 0
    return values.astype(np.float32).astype(dtype)


@settings(max_examples=60, deadline=None)
@given(seeds, scales, st.sampled_from([FLOAT16, BFLOAT16, np.dtype(np.float32)]))
def test_the_error_is_half_a_step(seed: int, scale: float, dtype: np.dtype[np.generic]) -> None:
    weight = random_weight(seed, 7, 96, scale, dtype)
    quantized, steps = quantize(weight)
    assert not quantized[0].any()
    assert np.isfinite(steps).all()
    assert not np.signbit(steps).any()
    exact = weight.astype(np.float64)
    error = np.abs(dequantize(quantized, steps) - exact)
    cut_off = exact > 127.5 * steps[:, None].astype(np.float64)  # code 128 does not exist
    subnormal = 128 * 2.0**-149  # a step that small is itself rounded
    assert (error <= np.where(cut_off, 1.0001, 0.5001) * steps[:, None].astype(np.float64) + subnormal).all()


@settings(max_examples=40, deadline=None)
@given(seeds, scales, st.sampled_from([FLOAT16, BFLOAT16]), st.sampled_from([FLOAT16, BFLOAT16]))
def test_codes_are_those_of_exact_arithmetic(
    seed: int, scale: float, source: np.dtype[np.generic], dtype: np.dtype[np.generic]
) -> None:
    """Rounded to the checkpoint's dtype first, then half away from zero, in fractions."""
    weight = random_weight(seed, 4, 32, scale, source)
    weight[1, :4] = np.array([1, 0.5, 0.50390625, -0.99609375]) * scale  # quotients that are ties, or nearly so
    quantized, _ = quantize(weight, dtype)
    for row, codes in zip(weight.astype(dtype).astype(np.float64), quantized, strict=True):
        step = Fraction(float(np.abs(row).max())) / 128
        for value, code in zip(row, codes, strict=True):
            quotient = abs(Fraction(float(value))) / step if step else Fraction(0)
            away = int(quotient + Fraction(1, 2))
            assert code == (min(away, 127) if value > 0 else -away)


def test_every_tie_is_turned_away_from_zero() -> None:
    row = np.array([[128.0, *(k + 0.5 for k in range(127)), *(-k - 0.5 for k in range(127))]], np.float16)
    (codes,), _ = quantize(row)
    assert codes.tolist() == [127, *range(1, 128), *(-k for k in range(1, 128))]


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(LAYOUTS), st.integers(1, 5), st.integers(1, 5))
def test_layouts_are_undone_by_their_readers(seed: int, layout: Int8Layout, tiles: int, pairs: int) -> None:
    quantized = np.random.default_rng(seed).integers(-128, 128, (64 * pairs, 64 * tiles)).astype(np.int8)
    stored = to_layout(quantized, layout)
    assert stored.shape == (64 * tiles, 64 * pairs)
    assert np.array_equal(from_layout(stored, layout), quantized)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_its_steps_one_after_another(layout: Int8Layout) -> None:
    """The steps as TensorRT-LLM's preprocessor takes them, spelled out byte by byte."""
    out, inner = 192, 128
    quantized = np.random.default_rng(0).integers(-128, 128, (out, inner)).astype(np.int8)
    matrix = quantized.T  # [K, N]
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    rows = np.concatenate([matrix[start : start + 16][order] for start in range(0, inner, 16)])
    columns = rows.T  # column major
    if layout == "sm80":
        pairs = [
            columns[pair : pair + 2, tile : tile + 64].reshape(-1)
            for pair in range(0, out, 2)
            for tile in range(0, inner, 64)
        ]
        columns = np.concatenate(pairs)
    content = (columns.reshape(-1).astype(np.int16) + 128).astype(np.uint8).reshape(-1, 4)
    expected = content[:, [0, 2, 1, 3]].reshape(inner, out)
    assert np.array_equal(to_layout(quantized, layout).view(np.uint8), expected)
    weight = random_weight(1, out, inner, 0.02, BFLOAT16)
    stored, steps = quantize_to_layout(weight, layout, FLOAT16)
    plain, plain_steps = quantize(weight, FLOAT16)
    assert np.array_equal(from_layout(stored, layout), plain)
    assert np.array_equal(steps, plain_steps)


@pytest.mark.parametrize(("inner", "tp_size"), [(576, 2), (260, 2), (320, 4), (64, 2), (384, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_intermediate_sizes_are_padded_as_nvidia_pads(
    tmp_path: Path, inner: int, tp_size: int, layout: Int8Layout
) -> None:
    """To a multiple of 64 * tp_size: the real rows and columns first, zeros in the last ranks."""
    model = random_model(hidden_size=256, intermediate_size=inner, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "hf")
    recipe = CheckpointRecipe(dtype="float16", tp_size=tp_size, quant="int8_wo", int8_layout=layout)
    run_conversion(plan_conversion(tmp_path / "hf", recipe), tmp_path / "out")
    ranks = [load_file(tmp_path / "out" / f"rank{rank}.safetensors") for rank in range(tp_size)]
    local = -(-inner // (64 * tp_size)) * 64
    for name, module, axis in [("fc", "gate_proj", 0), ("gate", "up_proj", 0), ("proj", "down_proj", 1)]:
        parts = []
        for rank in ranks:
            stored = rank[f"transformer.layers.0.mlp.{name}.weight"].numpy()
            assert stored.shape == ((256, local) if axis == 0 else (local, 256))
            codes = from_layout(stored, layout)
            parts.append(dequantize(codes, rank[f"transformer.layers.0.mlp.{name}.per_channel_scale"].numpy()))
        joined = np.concatenate(parts, axis=axis)
        source = getattr(model.model.layers[0].mlp, module).weight.detach().numpy()
        real, padding = np.split(joined, [inner], axis=axis)
        assert not padding.any()
        assert np.abs(real - source).max() <= 1.02 * np.abs(source).max() / 128
        assert real.any(axis=1 - axis).all()

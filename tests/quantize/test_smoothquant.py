"""SmoothQuant: what the INT8 codes stand for, in all four modes, with rows and channels that are dead or tiny.

The plain way to the same bits, with torch's own 16-bit arithmetic on whole matrices, stands beside it.
"""

from __future__ import annotations

import itertools
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtqwen.diagnostics import CheckpointError
from trtqwen.quantize.smoothquant import (
    ActivationRange,
    SmoothedRange,
    SmoothQuantMode,
    quantize_linear,
    quantize_qkv,
    smooth_gain,
    smooth_weight,
    smoother,
)

POOL = ThreadPoolExecutor(2)
MODES = [SmoothQuantMode(*flags) for flags in itertools.product([False, True], repeat=2)]
seeds = st.integers(0, 2**32 - 1)


def random_layer(seed: int, rows: int = 24, columns: int = 40) -> tuple[Any, ActivationRange]:
    """A float16 weight with a dead and a tiny row, and ranges with outliers and a channel that was never active."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.05, (rows, columns)).astype(np.float16)
    weight[1], weight[2] = 0, 6e-8
    x = rng.lognormal(0, 2, columns).astype(np.float32)
    x[3] = 0
    return weight, ActivationRange(x, rng.lognormal(0, 1, rows).astype(np.float32))


def smoothed_by_torch(source: Any, factor: Any) -> torch.Tensor:
    """float16 [out, in]: the product with a float64 factor, as NVIDIA's converter lets torch round it."""
    half = torch.from_numpy(np.asarray(source, np.float32)).half()
    return (half.double() * torch.from_numpy(factor)).float().half()


def codes_by_torch(smoothed: torch.Tensor, mode: SmoothQuantMode, dtype: torch.dtype, *, qkv: bool) -> Any:
    """int8 [out, in] from whole matrices in 16 bits."""
    largest = smoothed.abs().amax(dim=1, keepdim=True) if mode.per_channel else smoothed.abs().max()
    factors = (127.0 / largest).clamp(max=65504)
    if mode.per_channel:
        scaled = (smoothed if qkv else smoothed.to(dtype)).float() * factors.float()
    elif qkv:
        scaled = smoothed / (1 / factors)
    else:
        scaled = smoothed.to(dtype) * factors.item()
    return scaled.float().round().clamp(-127, 127).to(torch.int8).numpy()


def steps(mode: SmoothQuantMode, scale: Any, span: SmoothedRange) -> Any:
    """The weight's step, [out] or [1]: the scale without the activations' part."""
    if mode.per_token:
        return scale[0].astype(np.float64)
    return scale[0].astype(np.float64) * (127 / span.x) / (127 / span.y)


def check(mode: SmoothQuantMode, weight: Any, codes: Any, scale: Any, span: SmoothedRange) -> None:
    """Codes times step are the smoothed weight to half a step, and to the float16 roundings of weight and step."""
    assert np.isfinite(scale).all()
    step = steps(mode, scale, span)
    error = np.abs(codes.astype(np.float64) * step[:, None] - weight.astype(np.float64))
    roundings = 128 * step * 2.0**-9
    usable = np.abs(weight).max(axis=1).astype(np.float64) > 127 / 65504  # below, 127 / w leaves float16
    if not mode.per_channel:
        usable[:] = True
    assert (error <= (0.5 * step + roundings)[:, None])[usable].all()
    assert (np.abs(codes[usable]).max(axis=1) >= 126).sum() >= (usable.sum() if mode.per_channel else 1)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.quant_algo)
@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.5, 0.8, 1.0]), st.sampled_from([np.float16, ml_dtypes.bfloat16]))
def test_codes_stand_for_the_smoothed_weight(mode: SmoothQuantMode, seed: int, alpha: float, dtype: Any) -> None:
    weight, ranges = random_layer(seed)
    factor = smoother([weight], ranges.x, alpha, POOL)
    span, smoothed = ranges.smoothed(factor), smoothed_by_torch(weight, factor).numpy()
    rounded = smoothed.astype(dtype)
    lazy, scale = quantize_linear(smooth_weight(weight, factor, POOL), span, mode, np.dtype(dtype))
    codes = np.asarray(lazy)
    assert scale.shape == (1, len(weight) if mode.per_channel else 1)
    if dtype is np.float16:
        check(mode, rounded, codes, scale, span)
    else:  # the products are rounded to bfloat16 as well
        step = steps(mode, scale, span)
        error = np.abs(codes * step[:, None] - rounded.astype(np.float64))
        assert (error <= (step * 2)[:, None])[np.abs(rounded.astype(np.float32)).max(axis=1) > 0.002].all()
    assert not codes[1].any()

    thirds = [smooth_weight(third, factor, POOL) for third in np.split(weight, 3)]
    for part, (lazy, scale) in zip(np.split(smoothed, 3), quantize_qkv(thirds, span, mode), strict=True):
        assert scale.shape == (1, len(part))
        check(mode, part, np.asarray(lazy), scale, span)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.quant_algo)
@settings(max_examples=25, deadline=None)
@given(
    seeds,
    st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32]),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_the_bits_are_torchs(mode: SmoothQuantMode, seed: int, source: Any, dtype: torch.dtype) -> None:
    """Over all magnitudes of float16, subnormal ones too, and for any block of the matrix that is asked for."""
    rng = np.random.default_rng(seed)
    rows, columns, size = 40, 3000, np.exp2(rng.uniform(-26, 10, (40, 1)))
    weight = (rng.normal(0, 1, (rows, columns)) * size).astype(source)
    weight[3] = 0
    factor = rng.lognormal(-2, 1, columns).clip(1e-5, 4)
    smoothed = smoothed_by_torch(weight, factor)
    lazy = smooth_weight(weight, factor, POOL)
    assert np.array_equal(lazy.largest, smoothed.abs().amax(dim=1).numpy())

    span = SmoothedRange(3.0, 5.0)
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float16)
    expected = codes_by_torch(smoothed, mode, dtype, qkv=False)
    codes, _ = quantize_linear(lazy, span, mode, stored)
    assert codes.shape == expected.shape
    assert np.array_equal(codes, expected)
    begin, end = sorted(rng.integers(0, columns, 2))
    assert np.array_equal(codes[:, begin : end + 1][7:9], expected[7:9, begin : end + 1])
    ((codes, _),) = quantize_qkv([lazy], span, mode)
    assert np.array_equal(codes, codes_by_torch(smoothed, mode, dtype, qkv=True))


def test_every_float16_and_its_ties_are_rounded_as_numpy_does() -> None:
    """A smoother of 1 leaves each row's only weight as float16 holds it."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (exact[:-1] + exact[1:]) / 2
    values = np.concatenate([exact, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    for sign in (1, -1):
        rows = smooth_weight(sign * values[:, None], np.ones(1), POOL).largest
        assert np.array_equal(rows, values.astype(np.float16))
    factor = np.array([1.5 + 0.99 * 2**-24])  # a float32 factor would be 1.5, and many products ties
    small = values[values < 40000, None]
    products = smoothed_by_torch(small, factor)[:, 0].numpy()
    assert np.array_equal(smooth_weight(small, factor, POOL).largest, products)


def test_no_copy_of_a_matrix_is_held() -> None:
    """Of a bfloat16 matrix of 64 MiB, whose codes are asked for block by block, as they are written."""
    weight = np.full((8192, 4096), 0.5, ml_dtypes.bfloat16)
    x = np.ones(4096, np.float32)
    tracemalloc.start()
    try:
        factor = smoother([weight], x, 0.5, POOL)
        codes, _ = quantize_linear(smooth_weight(weight, factor, POOL), SmoothedRange(1, 1), MODES[0], weight.dtype)
        for start in range(0, 8192, 128):
            assert (np.asarray(codes[start : start + 128, 1024:2048]) == 127).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < weight.size / 4


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_smoothing_leaves_the_product_as_it_was(seed: int, alpha: float) -> None:
    """Inputs divided by the smoother, weights multiplied: the layer computes the same."""
    weight, ranges = random_layer(seed)
    factor = smoother([weight], ranges.x, alpha, POOL)
    assert (factor >= 1e-5).all()
    inputs = np.random.default_rng(seed).uniform(-1, 1, (5, weight.shape[1])) * ranges.x
    before = inputs @ weight.astype(np.float64).T
    after = (inputs / factor) @ smoothed_by_torch(weight, factor).double().numpy().T
    sizes = np.abs(inputs) @ np.abs(weight.astype(np.float64)).T
    subnormal = (np.abs(inputs) / factor).sum(axis=1, keepdims=True) * 2.0**-25
    assert (np.abs(before - after) <= sizes * 2.0**-10 + subnormal + 1e-12).all()


def test_alpha_moves_the_difficulty() -> None:
    """At alpha 1 all inputs come out alike, at alpha 0 all columns of the weight do."""
    weight, ranges = random_layer(0)
    weight, x = weight[3:], np.abs(ranges.x) + 0.1
    np.testing.assert_allclose(x / smoother([weight], x, 1.0, POOL), 1, rtol=1e-6)
    columns = smoothed_by_torch(weight, smoother([weight], x, 0.0, POOL)).abs().amax(dim=0).numpy()
    np.testing.assert_allclose(columns, 1, rtol=2e-3)


def test_a_channel_that_was_never_active_stays_finite() -> None:
    """Its smoother is the floor of 1e-5, by which a norm's weight of 1 leaves float16."""
    assert np.isfinite(smooth_gain(np.array([1, -3], np.float16), np.array([1e-5, 1e-5]))).all()


def test_smoothing_beyond_float16_is_refused() -> None:
    weight = np.full((2, 4), -1, np.float16)
    assert (smooth_weight(weight, np.full(4, 65519.9), POOL).largest == 65504).all()
    with pytest.raises(CheckpointError, match="lower sq_alpha"):
        smooth_weight(weight, np.array([1, 1, 1, 65520.0]), POOL)

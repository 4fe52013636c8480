"""SmoothQuant: what the INT8 codes stand for, in all four modes, with rows and channels that are dead or tiny."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtqwen.errors import CheckpointError
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
    factor = smoother([weight], ranges.x, alpha)
    span, smoothed = ranges.smoothed(factor), smooth_weight(weight, factor)
    rounded = smoothed.astype(dtype)
    codes, scale = quantize_linear(smoothed, span, mode, np.dtype(dtype))
    assert scale.shape == (1, len(weight) if mode.per_channel else 1)
    if dtype is np.float16:
        check(mode, rounded, codes, scale, span)
    else:  # the products are rounded to bfloat16 as well
        step = steps(mode, scale, span)
        error = np.abs(codes * step[:, None] - rounded.astype(np.float64))
        assert (error <= (step * 2)[:, None])[np.abs(rounded.astype(np.float32)).max(axis=1) > 0.002].all()
    assert not codes[1].any()

    parts = quantize_qkv(np.split(smoothed, 3), span, mode)
    for part, (codes, scale) in zip(np.split(smoothed, 3), parts, strict=True):
        assert scale.shape == (1, len(part))
        check(mode, part, codes, scale, span)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_smoothing_leaves_the_product_as_it_was(seed: int, alpha: float) -> None:
    """Inputs divided by the smoother, weights multiplied: the layer computes the same."""
    weight, ranges = random_layer(seed)
    factor = smoother([weight], ranges.x, alpha)
    assert (factor >= 1e-5).all()
    inputs = np.random.default_rng(seed).uniform(-1, 1, (5, weight.shape[1])) * ranges.x
    before = inputs @ weight.astype(np.float64).T
    after = (inputs / factor) @ smooth_weight(weight, factor).astype(np.float64).T
    sizes = np.abs(inputs) @ np.abs(weight.astype(np.float64)).T
    subnormal = (np.abs(inputs) / factor).sum(axis=1, keepdims=True) * 2.0**-25
    assert (np.abs(before - after) <= sizes * 2.0**-10 + subnormal + 1e-12).all()


def test_alpha_moves_the_difficulty() -> None:
    """At alpha 1 all inputs come out alike, at alpha 0 all columns of the weight do."""
    weight, ranges = random_layer(0)
    weight, x = weight[3:], np.abs(ranges.x) + 0.1
    np.testing.assert_allclose(x / smoother([weight], x, 1.0), 1, rtol=1e-6)
    columns = np.abs(smooth_weight(weight, smoother([weight], x, 0.0))).max(axis=0)
    np.testing.assert_allclose(columns, 1, rtol=2e-3)


def test_a_channel_that_was_never_active_stays_finite() -> None:
    """Its smoother is the floor of 1e-5, by which a norm's weight of 1 leaves float16."""
    assert np.isfinite(smooth_gain(np.array([1, -3], np.float16), np.array([1e-5, 1e-5]))).all()


def test_smoothing_beyond_float16_is_refused() -> None:
    weight = np.full((2, 4), 100, np.float16)
    with pytest.raises(CheckpointError, match="lower sq_alpha"):
        smooth_weight(weight, np.full(4, 1e4))

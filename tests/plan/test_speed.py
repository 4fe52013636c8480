"""The roofline against the arithmetic of the notes, and against what others have measured."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plan.recipes import make_recipe
from tests.plan.tables import TABLES
from trtqwen.checkpoint.config import Dtype
from trtqwen.hf.known import known_config
from trtqwen.plan.assumptions import assumptions
from trtqwen.plan.layouts import recipe_roofline
from trtqwen.plan.measured import Point, measured, point_work, shares
from trtqwen.plan.memory import plan_memory
from trtqwen.plan.plan import plan_recipe
from trtqwen.plan.speed import Roofline, Work

CONFIG = known_config("qwen2.5-7b")


def roofline(dtype: Dtype = "bfloat16", **sections: Any) -> Roofline:
    recipe = make_recipe(**sections)
    return recipe_roofline(recipe, CONFIG, dtype, plan_memory(recipe, CONFIG, dtype))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_reading_8192_tokens(tp_size: int) -> None:
    compute, slow, fast = TABLES["prefill_8192_ms"][str(tp_size)]
    step = roofline(checkpoint={"tp_size": tp_size}).largest_step(8192).step
    assert step.matrices * 1000 == pytest.approx(0.7 * compute, rel=0.01)  # the notes take 70 % of the peak
    assert step.exchange.high * 1000 == pytest.approx(slow, rel=0.03)
    assert step.exchange.low * 1000 == pytest.approx(fast * 20 / 25, rel=0.03)  # the notes' fast link has 20 GB/s
    assert step.bound == "compute"


@pytest.mark.parametrize("tokens", TABLES["all_reduce_mb"])
def test_traffic_of_the_all_reduces(tokens: str) -> None:
    link = assumptions().links.slow
    for tp_size, megabytes in zip((2, 4), TABLES["all_reduce_mb"][tokens], strict=True):
        speed = roofline(checkpoint={"tp_size": tp_size}, engine={"max_num_tokens": int(tokens)})
        seconds = speed.largest_step(int(tokens)).step.exchange.high - 57 * link.latency_us * 1e-6
        assert seconds * link.bus_gb_per_s * 1000 == pytest.approx(megabytes, rel=0.01)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_one_stream(tp_size: int) -> None:
    slow, fast = TABLES["decode_tokens_per_s"][str(tp_size)]
    point = roofline(checkpoint={"tp_size": tp_size}).generation(1, 0)
    likely, longest = point.step.nominal
    likely += (57 if tp_size > 1 else 0) * (20 - 11.5) * 1e-6  # the notes' fast link takes 20 us a message
    assert 1 / longest == pytest.approx(slow, rel=0.03)
    assert 1 / likely == pytest.approx(fast, rel=0.03)
    assert point.rate.bound >= 1 / likely


@pytest.mark.parametrize("quant", ["int8_wo", "int8_sq"])
def test_one_stream_in_int8(quant: str) -> None:
    point = roofline(checkpoint={"quant": quant}).generation(1, 0)
    assert point.rate.bound == pytest.approx(TABLES["decode_int8_tokens_per_s"], rel=0.03)
    assert point.step.bound == "bandwidth"


def test_only_smoothquant_multiplies_faster() -> None:
    plain, weight_only, smooth = (
        roofline(checkpoint={"quant": quant}).largest_step(1024).step.matrices
        for quant in ("none", "int8_wo", "int8_sq")
    )
    assert weight_only == plain
    assert plain / smooth == pytest.approx(4, rel=0.01)


def test_float32_doubles_every_cost() -> None:
    wide, plain = roofline("float32").largest_step(1024).step, roofline().largest_step(1024).step
    assert wide.matrices / plain.matrices == pytest.approx(2)
    assert wide.bandwidth / plain.bandwidth == pytest.approx(2)


def test_where_generation_stops_being_bound_by_bandwidth() -> None:
    """The notes put it at 146 requests in bfloat16 and at 73 with INT8 weights; that is at the full peak."""
    for quant, batch in (("none", 146), ("int8_wo", 73)):
        speed = roofline(checkpoint={"quant": quant}, engine={"max_batch_size": 512})
        reach = batch * assumptions().boost
        assert speed.generation(int(reach * 0.9), 0).step.bound == "bandwidth"
        assert speed.generation(int(reach * 1.2), 0).step.bound == "compute"


def test_a_long_prompt_pays_for_attention() -> None:
    """2 x tokens^2 x heads x head_size operations a layer, counted by hand."""
    speed = roofline(checkpoint={"yarn_factor": 4.0})
    seconds = 2 * 131072**2 * 28 * 128 * 28 / 147.1e12
    assert speed.prompt(131072).step.attention == pytest.approx(seconds, rel=1e-9)
    assert speed.prompt(131072).step.attention > speed.prompt(131072).step.matrices


def test_pipeline_stages_send_but_do_not_reduce() -> None:
    step = roofline(checkpoint={"pp_size": 4}).generation(1, 0).step
    assert 0 < step.exchange.high < 4 * 61e-6
    assert step.bandwidth == pytest.approx(roofline().generation(1, 0).step.bandwidth)


POINTS = measured().points


@pytest.mark.parametrize("point", POINTS, ids=[f"{p.card}-{p.model}-{p.kind}-{p.tokens_per_s:g}" for p in POINTS])
def test_every_public_point_is_at_or_under_the_bound(point: Point) -> None:
    work = point_work(point)
    assert point.tokens_per_s / point.replicas <= work.rate.bound
    assert point.tokens_per_s / point.replicas > work.rate.bound / 30  # the load is understood


def test_measured_products_are_under_the_bound() -> None:
    for card, tflops, _ in measured().products:
        assert tflops <= measured().cards[card].float16_tflops * assumptions().boost


@pytest.mark.parametrize("kind", ["context", "generation", "throughput"])
def test_the_forecast_spans_the_similar_points(kind: str) -> None:
    similar = [point for point in POINTS if point.kind == kind and point.similar]
    share = getattr(shares(), kind)
    assert share.points == len(similar) >= 3
    assert 0.2 < share.low < share.median < share.high < 1.2
    for point in similar:
        work = point_work(point)
        low, typical, high = Work(work.tokens, work.step, share).rate.forecast
        assert low <= typical <= high <= work.rate.bound
        assert point.tokens_per_s / point.replicas <= high * 1.0001
        if point.tp_size == 1:  # the slow link is slower than any that was measured
            assert low <= point.tokens_per_s / point.replicas * 1.0001


def test_a_full_load_is_bound_by_the_slowest_resource_over_the_whole_mix() -> None:
    """By hand, for the 7B in bfloat16 on one 4090D: compute and memory of a request, each alone."""
    work = roofline(engine={"max_batch_size": 64}).throughput(64, 1024, 512)
    values = 28 * (4608 * 3584 + 3584 * 3584 + 3 * 18944 * 3584)
    compute = 2.0 * values * (1024 + 512) + 2 * 152064 * 3584 * (512 + 1)
    compute += 4 * 28 * 28 * 128 * (1024 * 1024 / 2 + 512 * 1280)
    weights = 2 * (values + 152064 * 3584)
    memory = 512 / 64 * (weights + 64 * 1280 * 57344) / 1008e9
    bound = 512 / max(compute / 147.1e12 / 1.02, memory)
    assert work.rate.bound == pytest.approx(bound, rel=0.01)
    assert 4 * bound == pytest.approx(13_700, rel=0.01)


def test_float16_may_be_summed_in_float16() -> None:
    plain, half = roofline("bfloat16").prompt(8192), roofline("float16").prompt(8192)
    assert half.rate.bound == pytest.approx(2 * plain.rate.bound, rel=0.01)
    assert half.rate.forecast.typical == pytest.approx(plain.rate.forecast.typical)


def test_cards_with_peer_access_exchange_over_nvlink() -> None:
    """vLLM 0.24.0 reads 138,400 prompt tokens/s on four H200 with TP4: more than PCI express would carry."""
    recipe = make_recipe(host={"card": "h200-sxm"}, checkpoint={"tp_size": 4, "dtype": "float16"})
    speed = recipe_roofline(recipe, CONFIG, "float16", plan_memory(recipe, CONFIG, "float16"))
    assert speed.largest_step(2048).rate.bound > 138_400
    slower = roofline(checkpoint={"tp_size": 4}).largest_step(2048).step
    assert speed.largest_step(2048).step.link < slower.link / 5


def test_a_hint_names_no_replicas_where_the_embedded_engine_has_none() -> None:
    recipe = make_recipe(
        host={"card": "h100-sxm"}, checkpoint={"tp_size": 4}, engine={"backend": "torch", "max_batch_size": 256}
    )
    hints = [finding.hint for finding in plan_recipe(recipe).findings if finding.code in ("layout", "idle-cards")]
    assert hints
    assert all("serve.replicas" not in hint and "trtqwen gateway" in hint for hint in hints)

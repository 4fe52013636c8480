"""The roofline against the arithmetic of the notes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plan.recipes import make_recipe
from tests.plan.tables import TABLES
from trtqwen.checkpoint.config import Dtype
from trtqwen.hf.known import known_config
from trtqwen.plan.assumptions import assumptions
from trtqwen.plan.memory import plan_memory
from trtqwen.plan.speed import Roofline

CONFIG = known_config("qwen2.5-7b")


def roofline(dtype: Dtype = "bfloat16", **sections: Any) -> Roofline:
    recipe = make_recipe(**sections)
    return Roofline(recipe, CONFIG, dtype, plan_memory(recipe, CONFIG, dtype))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_reading_8192_tokens(tp_size: int) -> None:
    compute, slow, fast = TABLES["prefill_8192_ms"][str(tp_size)]
    step = roofline(checkpoint={"tp_size": tp_size}).largest_step(8192).step
    assert step.matrices * 1000 == pytest.approx(compute, rel=0.01)
    assert step.exchange.slow * 1000 == pytest.approx(slow, rel=0.03)
    assert step.exchange.fast * 1000 == pytest.approx(fast, rel=0.03)
    assert step.bound == {1: "compute", 2: "compute or all-reduce", 4: "compute or all-reduce"}[tp_size]


@pytest.mark.parametrize("tokens", TABLES["all_reduce_mb"])
def test_traffic_of_the_all_reduces(tokens: str) -> None:
    link = assumptions().links.slow
    for tp_size, megabytes in zip((2, 4), TABLES["all_reduce_mb"][tokens], strict=True):
        speed = roofline(checkpoint={"tp_size": tp_size}, engine={"max_num_tokens": int(tokens)})
        seconds = speed.largest_step(int(tokens)).step.exchange.slow - 57 * link.latency_us * 1e-6
        assert seconds * link.bus_gb_per_s * 1000 == pytest.approx(megabytes, rel=0.01)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_one_stream(tp_size: int) -> None:
    slow, fast = TABLES["decode_tokens_per_s"][str(tp_size)]
    rate = roofline(checkpoint={"tp_size": tp_size}).generation(1, 0).rate
    assert rate.slow == pytest.approx(slow, rel=0.03)
    assert rate.fast == pytest.approx(fast, rel=0.03)


@pytest.mark.parametrize("quant", ["int8_wo", "int8_sq"])
def test_one_stream_in_int8(quant: str) -> None:
    point = roofline(checkpoint={"quant": quant}).generation(1, 0)
    assert point.rate.fast == pytest.approx(TABLES["decode_int8_tokens_per_s"], rel=0.03)
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
        reach = batch * assumptions().compute_efficiency
        assert speed.generation(int(reach * 0.9), 0).step.bound == "bandwidth"
        assert speed.generation(int(reach * 1.2), 0).step.bound == "compute"


def test_a_long_prompt_pays_for_attention() -> None:
    """2 x tokens^2 x heads x head_size operations a layer, counted by hand."""
    speed = roofline(checkpoint={"yarn_factor": 4.0})
    seconds = 2 * 131072**2 * 28 * 128 * 28 / (147.1e12 * 0.7)
    assert speed.prompt(131072).step.attention == pytest.approx(seconds, rel=1e-9)
    assert speed.prompt(131072).step.attention > speed.prompt(131072).step.matrices


def test_pipeline_stages_send_but_do_not_reduce() -> None:
    step = roofline(checkpoint={"pp_size": 4}).generation(1, 0).step
    assert 0 < step.exchange.slow < 4 * 61e-6
    assert step.bandwidth == pytest.approx(roofline().generation(1, 0).step.bandwidth)

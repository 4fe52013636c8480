"""The simulator against what was measured on GPUs. The rows that it misses are named here, so that none hides."""

from __future__ import annotations

from scripts.simulate_measured import gpu_rows, point_row, serve_rows
from tests.slow import SLOW
from trtqwen.plan.measured import measured

# The host's time for short steps of four H200 is not modeled.
MISSED_OFFLINE = {
    "torch, h200-sxm, fp16, TP4, mixed",
    "vllm, h200-sxm, fp16, TP4, even",
}
# Its first token takes 0.8 s in the measurement, for a prompt of 512 tokens.
MISSED_SERVED = {"vllm serve, 1 concurrent requests"}
SIMULATED = {"generation", "context"}  # of the public points: those that take no time to simulate


@SLOW
def test_forecasts_the_loads_of_h100_and_h200_within_15_percent() -> None:
    rows = list(gpu_rows())
    assert len(rows) == 59
    assert {row.name for row in rows if row.calibrates} == {
        f"{engine}, h100-sxm, fp16, TP1, one" for engine in ("torch", "vllm")
    }
    for row in rows:
        assert row.measured <= row.bound
        assert not row.calibrates or abs(row.error) < 0.005, row
    assert {row.name for row in rows if abs(row.error) > 0.15} == MISSED_OFFLINE


@SLOW
def test_forecasts_servers_within_15_percent() -> None:
    rows = list(serve_rows())
    assert {row.name for row in rows if abs(row.error) > 0.15} == MISSED_SERVED
    assert all(row.measured <= row.bound for row in rows)


def test_public_points_lie_under_the_bound_and_near_the_forecast() -> None:
    rows = [
        (point, point_row(point))
        for point in measured().points
        if point.kind in SIMULATED or point.in_flight * point.answer < 25_000
    ]
    assert len(rows) >= 16
    assert all(row.measured <= row.bound for _, row in rows)
    missed = {
        f"{point.system} {point.kind} {point.in_flight}"
        for point, row in rows
        if point.precision in ("float16", "bfloat16") and abs(row.error) > 0.25
    }
    assert missed == {"vLLM throughput 48", "TensorRT-Edge-LLM context 1"}

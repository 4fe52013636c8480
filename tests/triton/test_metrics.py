"""Names of metrics, against upstream's."""

from __future__ import annotations

import json
from pathlib import Path

from trtqwen.engine.config import BuildConfig
from trtqwen.executor.request import IterationStats
from trtqwen.triton import metrics

UPSTREAM = json.loads(Path(__file__).with_name("data").joinpath("upstream.json").read_text("utf-8"))["metrics"]
# Of batches without in-flight batching, and of engines that hand a prompt's KV cache to others.
NOT_OURS = {"nv_trt_llm_v1_metrics", "nv_trt_llm_disaggregated_serving_metrics"}
BUILD = BuildConfig(max_batch_size=16, max_num_tokens=512, max_seq_len=512, tokens_per_block=32)


def test_families_labels_and_values_are_upstreams() -> None:
    gauges = metrics.gauges(IterationStats(max_blocks=4), BUILD, 1)
    ours: dict[tuple[str, str], set[str]] = {}
    for family, label, value in gauges:
        ours.setdefault((family, label), set()).add(value)
    for family, name in (metrics.INPUT_LENGTH, metrics.OUTPUT_LENGTH):
        ours[family, metrics.LENGTH_LABEL] = {name}
        assert list(metrics.LENGTH_BUCKETS) == UPSTREAM[family]["buckets"]
    assert ours == {
        (family, row["label"]): set(row["values"]) for family, row in UPSTREAM.items() if family not in NOT_OURS
    }


def test_what_waits_is_active_and_not_scheduled() -> None:
    stats = IterationStats(active=3, waiting=5, max_blocks=8, used_blocks=6, reused_blocks=9, context_requests=2)
    gauges = {(family, value): number for (family, _, value), number in metrics.gauges(stats, BUILD, 7).items()}
    requests = "nv_trt_llm_request_metrics"
    assert [gauges[requests, name] for name in ("active", "scheduled", "waiting", "context", "max")] == [
        8,
        3,
        5,
        2,
        16,
    ]
    blocks = "nv_trt_llm_kv_cache_block_metrics"
    assert [gauges[blocks, name] for name in ("used", "free", "fraction", "reused")] == [6, 2, 0.75, 9]
    assert gauges["nv_trt_llm_runtime_memory_metrics", "cpu"] == 7

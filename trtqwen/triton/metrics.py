"""Upstream's metrics of an engine, by family, label and label value, from the executor's statistics."""

from __future__ import annotations

import time

from trtqwen.engine.config import BuildConfig
from trtqwen.executor.request import IterationStats

Gauges = dict[tuple[str, str, str], float]

# Histograms of finished answers, in tokens: family, the value of its label, upstream's bucket bounds.
LENGTH_LABEL = "response_metric_type"
INPUT_LENGTH = ("nv_llm_input_token_len", "total_input_tokens")
OUTPUT_LENGTH = ("nv_llm_output_token_len", "total_output_tokens")
LENGTH_BUCKETS = (10, 50, 100, 500, 1000)

_LABELS = {
    "nv_trt_llm_request_metrics": "request_type",
    "nv_trt_llm_runtime_memory_metrics": "memory_type",
    "nv_trt_llm_kv_cache_block_metrics": "kv_cache_block_type",
    "nv_trt_llm_inflight_batcher_metrics": "inflight_batcher_specific_metric",
    "nv_trt_llm_general_metrics": "general_type",
}


def gauges(stats: IterationStats, build: BuildConfig, resident_bytes: int) -> Gauges:
    """Return the gauges of the metrics endpoint.

    `active` also counts the executor's queue, which upstream does not export. `waiting`, which upstream defines as
    active minus scheduled, is therefore the length of the queue.

    Args:
        resident_bytes: memory of the ranks' processes.
    """
    values: dict[str, dict[str, float]] = {
        "nv_trt_llm_request_metrics": {
            "active": stats.active + stats.waiting,
            "max": build.max_batch_size,
            "scheduled": stats.active,
            "context": stats.context_requests,
            "waiting": stats.waiting,
        },
        "nv_trt_llm_runtime_memory_metrics": {"cpu": resident_bytes, "gpu": 0, "pinned": 0},
        "nv_trt_llm_kv_cache_block_metrics": {
            "max": stats.max_blocks,
            "free": stats.max_blocks - stats.used_blocks,
            "used": stats.used_blocks,
            "tokens_per": build.tokens_per_block,
            "reused": stats.reused_blocks,
            "fraction": stats.used_blocks / stats.max_blocks,
        },
        "nv_trt_llm_inflight_batcher_metrics": {
            "total_context_tokens": stats.step_context_tokens,
            "generation_requests": stats.generation_requests,
            "micro_batch_id": 0,
            "paused_requests": stats.paused_requests,
        },
        "nv_trt_llm_general_metrics": {
            "timestamp": int(time.time()),  # seconds, as upstream's python backend; its C++ backend has microseconds
            "iteration_counter": stats.iterations,
        },
    }
    return {
        (family, _LABELS[family], name): float(value)
        for family, members in values.items()
        for name, value in members.items()
    }

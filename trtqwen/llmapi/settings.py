"""The arguments of `tensorrt_llm.LLM` for an engine. `model.yaml` of upstream's Triton model has the same keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import EngineError
from trtqwen.engine.config import EngineConfig
from trtqwen.executor.config import ExecutorConfig
from trtqwen.facts.cards import has_peer_to_peer
from trtqwen.facts.llmapi import llm_arguments, llmapi_release
from trtqwen.recipe import LlmApiSettings

_POLICIES = {"guaranteed_no_evict": "GUARANTEED_NO_EVICT", "max_utilization": "MAX_UTILIZATION"}


def arguments(
    config: EngineConfig, executor: ExecutorConfig, model: Path, installed: str, gpus: Sequence[str]
) -> dict[str, Any]:
    """Keyword arguments for `LLM`.

    Args:
        installed: version of TensorRT-LLM.
        gpus: names of the GPUs, as nvidia-smi gives them.

    Raises:
        EngineError: if that version does not know an argument.
    """
    build, checkpoint = config.build_config, config.pretrained_config
    cache: dict[str, Any] = {
        "enable_block_reuse": executor.enable_kv_cache_reuse,
        "free_gpu_memory_fraction": executor.kv_cache_free_gpu_mem_fraction,
        "tokens_per_block": build.tokens_per_block,
    }
    if executor.max_tokens_in_paged_kv_cache is not None:
        cache["max_tokens"] = executor.max_tokens_in_paged_kv_cache
    made: dict[str, Any] = {
        "model": str(model),
        "dtype": checkpoint.dtype,
        "tensor_parallel_size": checkpoint.mapping.tp_size,
        "pipeline_parallel_size": checkpoint.mapping.pp_size,
        "max_batch_size": build.max_batch_size,
        "max_num_tokens": build.max_num_tokens,
        "max_seq_len": build.max_seq_len,
        "enable_chunked_prefill": executor.enable_chunked_context,
        "kv_cache_config": cache,
        "scheduler_config": {"capacity_scheduler_policy": _POLICIES[executor.batch_scheduler_policy]},
        "cuda_graph_config": {"max_batch_size": build.max_batch_size, "enable_padding": True},
        "guided_decoding_backend": "xgrammar",
        "enable_iter_perf_stats": True,
    }
    if checkpoint.quantization.quant_algo == "W8A16":
        made["quant_config"] = {"quant_algo": "W8A16"}
    if checkpoint.mapping.tp_size > 1 and not all(map(has_peer_to_peer, gpus)):
        # AUTO crashes where cards cannot read each other's memory (NVIDIA/TensorRT-LLM issue 16899).
        made["allreduce_strategy"] = "NCCL"
    made |= (config.llmapi or LlmApiSettings()).arguments
    release = llmapi_release(installed)
    unknown = sorted(made.keys() - llm_arguments(release))
    if unknown:
        raise EngineError(
            f"LLM of TensorRT-LLM {installed} has no argument {unknown[0]!r}",
            "correct engine.llmapi.arguments in the recipe, or use the image of engine.llmapi.release",
        )
    return made

"""vLLM's options for an engine, from TensorRT-LLM's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from trtqwen.diagnostics import EngineError
from trtqwen.engine.config import EngineConfig
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import MOST_TOP_LOG_PROBS
from trtqwen.recipe import VllmSettings

_VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_CPU_BLOCK = 32  # CPU_ATTN of vLLM 0.32
_MOST_UTILIZATION = 0.97  # beyond it, cuBLAS and the driver do not find room


def server_options(
    config: EngineConfig,
    executor: ExecutorConfig,
    *,
    gpu_bytes: int | None = None,
    weights_bytes: int = 0,
    peer_to_peer: bool = True,
) -> dict[str, str | bool]:
    """The options of the API server, without dashes; a bool says whether a switch is on.

    Args:
        gpu_bytes: memory of one GPU; None on a machine without.
        weights_bytes: of one rank.
        peer_to_peer: whether the cards can read each other's memory.

    Raises:
        EngineError: if vLLM has no such block size on this machine.
    """
    build, checkpoint = config.build_config, config.pretrained_config
    given = config.vllm or VllmSettings()
    options: dict[str, str | bool] = {
        "served-model-name": given.served_name,
        "dtype": checkpoint.dtype,
        "max-model-len": str(build.max_seq_len),
        "max-num-seqs": str(build.max_batch_size),
        "max-num-batched-tokens": str(build.max_num_tokens),
        "block-size": str(build.tokens_per_block),
        "tensor-parallel-size": str(checkpoint.mapping.tp_size),
        "pipeline-parallel-size": str(checkpoint.mapping.pp_size),
        "enable-prefix-caching": executor.enable_kv_cache_reuse,
        "enable-chunked-prefill": executor.enable_chunked_context,
        # A model's generation_config.json would change requests that leave a field out.
        "generation-config": "vllm",
        "logprobs-mode": "raw_logprobs",
        "max-logprobs": str(MOST_TOP_LOG_PROBS),
        "enable-prompt-tokens-details": True,
        # A guide that lets white space through lets a model write it forever.
        "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    }
    blocks = kv_cache_blocks(config, executor)
    if gpu_bytes is None and build.tokens_per_block % _CPU_BLOCK:
        raise EngineError(
            f"engine.tokens_per_block {build.tokens_per_block}: vLLM's CPU attention takes multiples of {_CPU_BLOCK}",
            f"set it to {_CPU_BLOCK} and build again",
        )
    if gpu_bytes is None or executor.max_tokens_in_paged_kv_cache is not None:
        options["num-gpu-blocks-override"] = str(blocks)
    if gpu_bytes is not None:
        options["gpu-memory-utilization"] = f"{memory_utilization(executor, gpu_bytes, weights_bytes):.3f}"
    if not peer_to_peer and checkpoint.mapping.world_size > 1:
        options["disable-custom-all-reduce"] = True  # it reads the other cards' memory
    for name, value in given.arguments.items():
        options[name] = value if isinstance(value, bool) else str(value)
    return options


def command_line(options: Mapping[str, str | bool]) -> list[str]:
    """The options as words: `--name=value`, `--name`, or `--no-name` for a switch that is off."""
    return [
        (f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name}={value}"
        for name, value in options.items()
    ]


def kv_cache_blocks(config: EngineConfig, executor: ExecutorConfig) -> int:
    """KV cache blocks that the recipe asks for: its cap, or every full-length batch. vLLM keeps one for itself."""
    build = config.build_config
    tokens = executor.max_tokens_in_paged_kv_cache or build.max_batch_size * build.max_seq_len
    return tokens // build.tokens_per_block + 1


def memory_utilization(executor: ExecutorConfig, gpu_bytes: int, weights_bytes: int) -> float:
    """vLLM's share of the whole GPU memory, from TensorRT-LLM's share of what the weights leave."""
    cache = executor.kv_cache_free_gpu_mem_fraction * (gpu_bytes - weights_bytes)
    return min(_MOST_UTILIZATION, (weights_bytes + cache) / gpu_bytes)


def cpu_cache_gib(config: EngineConfig, executor: ExecutorConfig) -> int:
    """Return VLLM_CPU_KVCACHE_SPACE: GiB for the requested blocks."""
    checkpoint = config.pretrained_config
    values = 2 * checkpoint.num_hidden_layers * checkpoint.local_kv_heads * checkpoint.head_size
    tokens = kv_cache_blocks(config, executor) * config.build_config.tokens_per_block
    return max(1, math.ceil(tokens * values * _VALUE_BYTES[checkpoint.dtype] / 2**30))


def model_bytes(model: Path) -> int:
    """Bytes of the weight files of a model directory."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))

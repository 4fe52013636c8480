"""Settings of the executor: the serving settings of a recipe, as the Triton model's parameters hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trtqwen.engine.config import EngineConfig
from trtqwen.executor.scheduler import SchedulerConfig, SchedulerPolicy

_LEAST_SHARE = 1024
_WORTH_A_STEP = 6_500_000_000_000  # tokens times matrix values


class ExecutorConfig(BaseModel):
    """How an engine runs: limits by TensorRT-LLM's names, and the device.

    Attributes:
        max_tokens_in_paged_kv_cache: None holds every full-length batch on CPU, and fills the free memory on CUDA.
        kv_cache_free_gpu_mem_fraction: share of the GPU memory left after weights and a warm-up step.
        device: `auto` is CUDA on hosts with a GPU.
        attention: `plain` is the formula written out in PyTorch, on any device.
        cuda_graphs: replay small steps, and those that only generate, as CUDA graphs.
        overlap: schedule a step while the one before runs, on CUDA.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_scheduler_policy: SchedulerPolicy = "guaranteed_no_evict"
    enable_chunked_context: bool = True
    enable_kv_cache_reuse: bool = False
    max_tokens_in_paged_kv_cache: Annotated[int, Field(gt=0)] | None = None
    max_queue_size: Annotated[int, Field(ge=0)] = 0
    kv_cache_free_gpu_mem_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "plain"] = "auto"
    cuda_graphs: bool = True
    overlap: bool = True


class WorkerConfig(BaseModel):
    """The input of one rank's process.

    Attributes:
        rendezvous: file with which the ranks find each other.
        threads: CPU threads of this rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Path
    executor: ExecutorConfig
    rank: int
    rendezvous: Path
    threads: int


def kv_cache_blocks(engine: EngineConfig, executor: ExecutorConfig) -> int:
    """Return the number of KV cache blocks: the configured one, or enough for a batch of full-length requests."""
    build = engine.build_config
    tokens = executor.max_tokens_in_paged_kv_cache or build.max_batch_size * build.max_seq_len
    return tokens // build.tokens_per_block


def context_share(matrix_values: int) -> int:
    """Return the maximum number of context tokens in a step while other requests generate.

    The number is large enough for an efficient step. By the cost model of `simulate`, 1,024 tokens of a 7B model take
    22 ms on an H100 in float16, at 95 % of the rate of 8,192 tokens. A smaller model, or one rank's part of a model,
    needs more tokens for the same rate.

    Args:
        matrix_values: of the layers of one rank.
    """
    return max(_LEAST_SHARE, _WORTH_A_STEP // matrix_values)


def scheduler_config(engine: EngineConfig, executor: ExecutorConfig, num_blocks: int) -> SchedulerConfig:
    """Return the scheduler's limits for an engine with `num_blocks` KV cache blocks."""
    build, model = engine.build_config, engine.pretrained_config
    return SchedulerConfig(
        max_batch_size=build.max_batch_size,
        max_num_tokens=build.max_num_tokens,
        max_seq_len=build.max_seq_len,
        tokens_per_block=build.tokens_per_block,
        num_blocks=num_blocks,
        vocab_size=model.vocab_size,
        batch_scheduler_policy=executor.batch_scheduler_policy,
        enable_chunked_context=executor.enable_chunked_context,
        enable_kv_cache_reuse=executor.enable_kv_cache_reuse,
        max_queue_size=executor.max_queue_size,
        context_share=context_share(model.matrix_values),
    )

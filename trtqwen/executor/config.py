"""How the executor runs an engine: the runtime side of a recipe, as the Triton model's parameters carry it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from trtqwen.engine.config import EngineConfig
from trtqwen.executor.scheduler import SchedulerConfig, SchedulerPolicy


class ExecutorConfig(BaseModel):
    """Runtime limits, by TensorRT-LLM's names. `max_tokens_in_paged_kv_cache` None holds every full-length batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_scheduler_policy: SchedulerPolicy = "guaranteed_no_evict"
    enable_chunked_context: bool = True
    enable_kv_cache_reuse: bool = False
    max_tokens_in_paged_kv_cache: Annotated[int, Field(gt=0)] | None = None
    max_queue_size: Annotated[int, Field(ge=0)] = 0


class WorkerConfig(BaseModel):
    """What one rank's process is started with.

    Attributes:
        rendezvous: file through which the ranks find each other.
        threads: CPU threads of this rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Path
    executor: ExecutorConfig
    rank: int
    rendezvous: Path
    threads: int


def scheduler_config(engine: EngineConfig, executor: ExecutorConfig) -> SchedulerConfig:
    """The limits of the step loop for an engine."""
    build = engine.build_config
    tokens = executor.max_tokens_in_paged_kv_cache or build.max_batch_size * build.max_seq_len
    return SchedulerConfig(
        max_batch_size=build.max_batch_size,
        max_num_tokens=build.max_num_tokens,
        max_seq_len=build.max_seq_len,
        tokens_per_block=build.tokens_per_block,
        num_blocks=tokens // build.tokens_per_block,
        vocab_size=engine.pretrained_config.vocab_size,
        batch_scheduler_policy=executor.batch_scheduler_policy,
        enable_chunked_context=executor.enable_chunked_context,
        enable_kv_cache_reuse=executor.enable_kv_cache_reuse,
        max_queue_size=executor.max_queue_size,
    )

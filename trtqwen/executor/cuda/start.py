"""Start a rank on a GPU: weights, kernels, a warm-up that measures the memory of a step, KV cache, CUDA graphs."""

from __future__ import annotations

import os
import sys
import time

import torch

from trtqwen.checkpoint.reader import read_rank
from trtqwen.diagnostics import EngineError
from trtqwen.engine.config import EngineConfig
from trtqwen.executor.config import WorkerConfig
from trtqwen.executor.cuda.kernels.choose import choose_fused
from trtqwen.executor.cuda.kernels.penalize import penalize_fused
from trtqwen.executor.cuda.model import CudaModel
from trtqwen.executor.cuda.runner import CudaRunner
from trtqwen.executor.cuda.warm_up import compile_kernels, measure_steps
from trtqwen.executor.device import DeviceChoice
from trtqwen.executor.parallel import Communicator
from trtqwen.executor.plain_runner import Started
from trtqwen.executor.sampling import Sampler
from trtqwen.system.cache import user_cache

_GIB = 1 << 30
_MOSTLY_FREE = 0.9  # of a card's memory: less means that other processes use it
_STOP_OTHERS = "stop the other processes on the card, which `nvidia-smi` lists"


def keep_compiled_kernels() -> None:
    """Let the Triton language keep compiled kernels in the user's cache directory."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(user_cache("kernels")))


def make_runner(
    config: WorkerConfig, engine: EngineConfig, choice: DeviceChoice, communicator: Communicator
) -> Started:
    """Load a rank's share of the model and prepare it for serving.

    Raises:
        EngineError: if the card's memory is too small, naming what to lower.
    """
    clock = _Clock(config.rank)
    build = engine.build_config
    try:
        torch.cuda.set_device(choice.device)
        free, total = torch.cuda.mem_get_info(choice.device)
    except torch.AcceleratorError as problem:
        if "out of memory" not in str(problem):
            raise
        raise EngineError(f"{choice.device} has no memory left for CUDA itself", _STOP_OTHERS) from None
    clock.lap("CUDA")
    try:
        model = CudaModel(
            engine.pretrained_config,
            dict(read_rank(config.engine, config.rank)),
            communicator,
            int8_layout=engine.int8_layout,
            dtype=choice.dtype,
            device=choice.device,
            max_batch_size=build.max_batch_size,
            max_seq_len=build.max_seq_len,
        )
    except torch.OutOfMemoryError:
        hint = "convert with a larger tp_size, or with quant: int8_wo"
        raise EngineError(
            f"the weights do not fit {choice.device}, where {free / _GIB:.1f} of {total / _GIB:.1f} GiB were free",
            f"{_STOP_OTHERS}, or {hint}" if free < _MOSTLY_FREE * total else hint,
        ) from None
    clock.lap("weights")
    blocks_of_sequence = -(-build.max_seq_len // build.tokens_per_block)
    sampler = Sampler(build.max_batch_size, choice.device, choose_fused, penalize_fused)
    if config.rank == 0:
        sampler.make_tables(engine.pretrained_config.vocab_size)
    try:
        runner = CudaRunner(
            model,
            choice.device,
            max_batch_size=build.max_batch_size,
            max_num_tokens=build.max_num_tokens,
            max_blocks=blocks_of_sequence,
        )
        model.allocate_cache(1, build.tokens_per_block, choice.kv_dtype)
        compiled = compile_kernels(runner, model, engine, choice.device)
        clock.lap(f"{compiled} kernels")
        need = measure_steps(runner, engine, choice.device, sampler)
    except torch.OutOfMemoryError:
        raise EngineError(
            f"a step of max_num_tokens {build.max_num_tokens} does not fit the memory that the weights leave",
            f"lower engine.max_num_tokens, to {build.max_num_tokens // 2} or less",
        ) from None
    clock.lap("warm-up")
    num_blocks = _num_blocks(config, engine, choice, model, need)
    num_blocks = communicator.least(num_blocks)
    if num_blocks < blocks_of_sequence:
        tokens = num_blocks * build.tokens_per_block
        raise EngineError(
            (
                f"the KV cache holds {tokens} tokens, less than one request of max_seq_len {build.max_seq_len}; "
                f"a step of max_num_tokens {build.max_num_tokens} takes {need / _GIB:.1f} GiB"
            ),
            (
                f"lower engine.max_seq_len to {tokens}, or engine.max_num_tokens"
                if tokens
                else "lower engine.max_num_tokens, or convert with a larger tp_size"
            ),
        )
    model.allocate_cache(num_blocks, build.tokens_per_block, choice.kv_dtype)
    clock.lap(f"KV cache of {num_blocks * build.tokens_per_block} tokens")
    if choice.graphs:
        try:
            runner.capture(sampler.last_tokens)
        except torch.OutOfMemoryError:
            fraction = config.executor.kv_cache_free_gpu_mem_fraction
            raise EngineError(
                "there is no memory left for the CUDA graphs",
                f"lower serve.kv_cache_free_gpu_mem_fraction below {fraction:g}, or engine.max_batch_size",
            ) from None
        clock.lap("CUDA graphs")
    torch.cuda.synchronize(choice.device)
    clock.say(str(choice))
    return Started(runner, num_blocks, sampler)


def _num_blocks(config: WorkerConfig, engine: EngineConfig, choice: DeviceChoice, model: CudaModel, need: int) -> int:
    """Return the blocks in `kv_cache_free_gpu_mem_fraction` of the memory after weights and largest step."""
    build, executor = engine.build_config, config.executor
    free = torch.cuda.mem_get_info(choice.device)[0] - need
    block = model.kv_block_bytes(build.tokens_per_block, choice.kv_dtype)
    num_blocks = max(0, int(free * executor.kv_cache_free_gpu_mem_fraction) // block)
    if executor.max_tokens_in_paged_kv_cache is not None:
        num_blocks = min(num_blocks, executor.max_tokens_in_paged_kv_cache // build.tokens_per_block)
    # More than every sequence at its longest is never used, unless blocks are kept for reuse.
    every = build.max_batch_size * -(-build.max_seq_len // build.tokens_per_block)
    return num_blocks if executor.enable_kv_cache_reuse else min(num_blocks, every)


class _Clock:
    """Logs the duration of each part of a start."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._last = time.monotonic()
        self._laps: list[str] = []

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.monotonic()
        self._laps.append(f"{name} {now - self._last:.1f} s")
        self._last = now

    def say(self, how: str) -> None:
        """Log one line with all parts."""
        print(f"rank {self._rank} started on {how}: {', '.join(self._laps)}", file=sys.stderr, flush=True)

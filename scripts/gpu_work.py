"""What a load costs at least in arithmetic and memory traffic, and what a card reaches of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trtqwen.hf.config import HfConfig

_READ_BYTES = 4 << 30  # far beyond any cache
_SIDE = 8192
_REPEATS = 20
_BYTES = {"fp16": 2, "w8a8": 1, "w8a8-static": 1, "w8a16": 1, "fp16-int8kv": 2}  # of a weight of a linear layer


@dataclass(frozen=True)
class Ceilings:
    """Measured on the card: products in TFLOP/s, or TOP/s for INT8, and reading in GB/s."""

    products: float
    reading: float


def measure_ceilings(precision: str) -> Ceilings:
    """Time large products in the arithmetic of `precision`, and reading memory, on CUDA device 0."""
    device = torch.device("cuda")
    if precision.startswith("w8a8"):
        codes = torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8, device=device)
        product = _seconds(lambda: torch._int_mm(codes, codes.T))
    else:
        matrix = torch.randn(_SIDE, _SIDE, dtype=torch.float16, device=device)
        product = _seconds(lambda: matrix @ matrix.T)
    values = torch.zeros(_READ_BYTES // 2, dtype=torch.float16, device=device)
    reading = _seconds(lambda: values.sum())
    return Ceilings(2 * _SIDE**3 / product / 1e12, _READ_BYTES / reading / 1e9)


def _seconds(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / _REPEATS


def operations(config: HfConfig, shapes: Sequence[tuple[int, int]]) -> float:
    """Floating-point (or integer) operations of requests of (prompt, answer) tokens: products of matrices alone."""
    total = 0.0
    per_token, head = 2 * _layers(config), 2 * config.vocab_size * config.hidden_size
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_size
    for prompt, answer in shapes:
        computed = prompt + answer - 1  # the last token is never fed back
        total += per_token * computed + head * answer + pair * computed * (computed + 1) / 2
    return total


def traffic(config: HfConfig, precision: str, shapes: Sequence[tuple[int, int]]) -> float | None:
    """Bytes that generation reads at least: weights once a step, and each sequence's keys and values.

    None where requests differ, so that the number of steps is the scheduler's, or where reading prompts is the load.
    """
    (prompt, answer), *others = dict.fromkeys(shapes)
    if others or answer == 1:
        return None
    weights = _layers(config) * _BYTES[precision] + config.vocab_size * config.hidden_size * 2
    value = 1 if precision.endswith("int8kv") else 2
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * value
    steps = answer - 1
    return steps * weights + len(shapes) * token * sum(prompt + step for step in range(1, answer))


def _layers(config: HfConfig) -> int:
    """Weights of all linear layers."""
    hidden, size = config.hidden_size, config.head_size
    query, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    layer = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * config.intermediate_size
    return config.num_hidden_layers * layer

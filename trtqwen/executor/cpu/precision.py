"""A measurement of whether this host multiplies 16-bit matrices faster than float32 ones: no CPU flag shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trtqwen.executor.linear import FloatLinear, Linear, PackedLinear

_WIDTH, _MATRICES = 2048, 4  # 64 MiB in float32: a core's caches hold none of it
_ROWS = (1, 64)
_ROUNDS = 12
_PAYS = 1.2  # times as fast, for every number of rows: less is not worth rounding for


@dataclass(frozen=True)
class PrecisionTrial:
    """Speed of matrix products in a 16-bit dtype on this host.

    Attributes:
        speedups: over float32, by the number of rows.
    """

    dtype: torch.dtype
    speedups: dict[int, float]

    @property
    def pays(self) -> bool:
        """Whether weights and KV cache use this dtype."""
        return min(self.speedups.values()) >= _PAYS

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        speeds = ", ".join(f"{speedup:.2f} times float32 for {rows} rows" for rows, speedup in self.speedups.items())
        return f"{name} matrices run at {speeds}: computing in {name if self.pays else 'float32'}"


@torch.inference_mode()
def try_precision(dtype: torch.dtype, *, packed: bool) -> PrecisionTrial:
    """Time products of a few rows with matrices larger than the CPU caches. Takes a few tenths of a second.

    Args:
        packed: pack matrices for oneDNN, as the engine does.
    """
    kind: type[PackedLinear] | type[FloatLinear] = PackedLinear if packed else FloatLinear
    layers: dict[torch.dtype, list[Linear]] = {
        kept: [kind(torch.randn(_WIDTH, _WIDTH).to(kept), None) for _ in range(_MATRICES)]
        for kept in (torch.float32, dtype)
    }
    inputs = {(kept, rows): torch.randn(rows, _WIDTH).to(kept) for kept in layers for rows in _ROWS}
    best = dict.fromkeys(inputs, float("inf"))
    # Rounds alternate between the dtypes, and the shortest time counts: other programs only add to it.
    for _ in range(_ROUNDS):
        for (kept, rows), hidden in inputs.items():
            best[kept, rows] = min(best[kept, rows], _seconds(layers[kept], hidden))
    return PrecisionTrial(dtype, {rows: best[torch.float32, rows] / best[dtype, rows] for rows in _ROWS})


def _seconds(layers: list[Linear], hidden: Tensor) -> float:
    begun = time.perf_counter()
    for layer in layers:
        layer(hidden)
    return time.perf_counter() - begun

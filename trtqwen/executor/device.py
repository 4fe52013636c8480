"""Choice of device, dtypes, attention and kernels, from an engine's config and this host."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

from trtqwen.diagnostics import EngineError
from trtqwen.engine.config import EngineConfig
from trtqwen.executor.config import ExecutorConfig

_ATTENTION = "TRTQWEN_ATTENTION"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class DeviceChoice:
    """Device, dtypes and kernels of one rank.

    Attributes:
        device: `cpu`, or the rank's own card.
        dtype: of the computation.
        kv_dtype: of the KV cache: int8 if the checkpoint says so, `dtype` otherwise.
        kernels: `fused` is the CUDA model with kernels in the Triton language; `packed`, on the CPU, has matrices
            packed for oneDNN and INT8 kernels; `plain` is PyTorch's operators.
        attention: `fused` (CUDA), `cpu`, or `plain`, the formula written out.
        graphs: whether small steps, and those that only generate, are replayed as CUDA graphs.
        overlap: whether a step is scheduled while the one before runs.
    """

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    kernels: Literal["fused", "packed", "plain"]
    attention: Literal["fused", "cpu", "plain"]
    graphs: bool
    overlap: bool

    def __str__(self) -> str:
        kv = str(self.kv_dtype).removeprefix("torch.")
        parts = [f"{self.device}, {str(self.dtype).removeprefix('torch.')}, KV cache {kv}", f"{self.kernels} kernels"]
        parts += [f"{self.attention} attention"]
        parts += ["CUDA graphs"] * self.graphs + ["overlapped steps"] * self.overlap
        return ", ".join(parts)


def choose_device(engine: EngineConfig, config: ExecutorConfig, rank: int) -> DeviceChoice:
    """Decide for one rank.

    Raises:
        EngineError: if the config asks for a device that is missing here, or for kernels that it does not have.
    """
    kind = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device
    attention = _attention(config)
    if kind != "cuda":
        kv_dtype = torch.float32  # what CPUs compute in; every 16-bit weight is exact in it
        plain = attention == "plain" or importlib.util.find_spec("numba") is None
        return DeviceChoice(
            device=torch.device("cpu"),
            dtype=torch.float32,
            kv_dtype=kv_dtype,
            kernels="plain" if plain else "packed",
            attention="plain" if plain else "cpu",
            graphs=False,
            overlap=False,
        )
    ranks, cards = engine.pretrained_config.rank_mapping.world_size, torch.cuda.device_count()
    if ranks > cards:
        raise EngineError(
            f"the engine has {ranks} ranks, and this host shows {cards} CUDA devices",
            "convert with a smaller tp_size, or show it more cards with CUDA_VISIBLE_DEVICES",
        )
    dtype = _DTYPES[engine.pretrained_config.dtype]
    fused = attention != "plain" and importlib.util.find_spec("triton") is not None
    int8_kv = engine.pretrained_config.quantization.kv_cache_quant_algo == "INT8"
    return DeviceChoice(
        device=torch.device("cuda", rank),
        dtype=dtype,
        kv_dtype=torch.int8 if int8_kv and fused else dtype,
        kernels="fused" if fused else "plain",
        attention="fused" if fused else "plain",
        graphs=fused and config.cuda_graphs,
        overlap=config.overlap,
    )


def _attention(config: ExecutorConfig) -> str:
    """The environment's choice of attention, or the config's."""
    name = os.environ.get(_ATTENTION, config.attention)
    if name not in ("auto", "cpu", "fused", "plain"):
        raise EngineError(f"{_ATTENTION} is {name!r}", "set it to cpu, fused or plain, or leave it unset")
    return name

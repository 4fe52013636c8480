"""Rotary embedding: the rotation frequencies of a model, plain, linearly stretched or stretched by YaRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtqwen.diagnostics import InputError


@dataclass(frozen=True)
class Rotary:
    """Angles per position and a factor on their sines and cosines.

    Attributes:
        inverse_frequencies: float32 [head_size / 2], radians per position.
        scale: multiplies cos and sin; 1 without YaRN.
    """

    inverse_frequencies: Tensor
    scale: float

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [tokens], each [tokens, 1, head_size]; both halves of a head are alike."""
        angles = positions[:, None].float() * self.inverse_frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def make_rotary(base: float, head_size: int, scaling: Mapping[str, Any] | None, device: torch.device) -> Rotary:
    """The rotation of a config's base and scaling.

    A linear scaling (Chen et al. 2023) divides every position by its factor.

    YaRN (Peng et al. 2023, as in transformers): dimensions that turn more than beta_fast times within the original
    context keep their frequency, those that turn less than beta_slow times are slowed by `factor`, with a linear
    ramp between; cosines and sines are scaled by 0.1 mscale ln(factor) + 1 over the same of mscale_all_dim, which are
    1 and 0 if the scaling does not name them, as in TensorRT-LLM.

    Raises:
        InputError: if the scaling is of another type, or lacks a field.
    """
    exponents = torch.arange(0, head_size, 2, device=device).float() / head_size
    frequencies = 1.0 / base**exponents
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if scaling is None or kind == "default":
        return Rotary(frequencies, 1.0)
    if kind == "linear":
        return Rotary(frequencies / float(scaling["factor"]), 1.0)
    if kind != "yarn":
        raise InputError(
            f"rope_scaling type {kind} is not computed by the torch engine", "use the tensorrt_llm backend"
        )
    try:
        factor, original = float(scaling["factor"]), int(scaling["original_max_position_embeddings"])
    except KeyError as problem:
        raise InputError(f"rope_scaling lacks {problem.args[0]!r}", "add it to config.json") from None

    def dimension(turns: float) -> float:
        return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), head_size - 1)
    steps = torch.arange(head_size // 2, device=device).float()
    slowed = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    blended = frequencies / factor * slowed + frequencies * (1 - slowed)

    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return Rotary(blended, amplitude(scaling.get("mscale", 1.0)) / amplitude(scaling.get("mscale_all_dim", 0.0)))


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [tokens, heads, head_size], GPT-NeoX style: a head's first half against its second."""
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos + torch.cat([-second, first], dim=-1) * sin

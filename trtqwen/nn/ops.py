"""Torch operators that the reference forward pass, the executor and `verify` share."""

from __future__ import annotations

import torch
from torch import Tensor

from trtqwen.safetensors_io.format import Array


def to_torch(tensor: Array) -> Tensor:
    """A copy of a numpy tensor, bfloat16 included."""
    if tensor.dtype.name == "bfloat16":  # torch does not know numpy's extension dtypes
        return torch.from_numpy(tensor.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.copy())


def rms_norm(hidden: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in float32."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return gain * wide.to(hidden.dtype)

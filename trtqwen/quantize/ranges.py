"""Activation ranges on disk: one safetensors file, keys `<hf module>.x` and `<hf module>.y`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trtqwen.diagnostics import InputError
from trtqwen.quantize.smoothquant import ActivationRange
from trtqwen.safetensors_io.format import TensorSpec
from trtqwen.safetensors_io.reader import SafetensorsReader
from trtqwen.safetensors_io.writer import SafetensorsWriter

ACT_RANGES = "act_ranges.safetensors"
LINEARS = (
    *(f"self_attn.{letter}_proj" for letter in "qkvo"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def read_ranges(path: Path, num_layers: int) -> dict[str, ActivationRange]:
    """The ranges of every linear layer, by Hugging Face module name; other keys are left alone.

    Raises:
        InputError: if the file is damaged, lacks a layer, or holds values that cannot be ranges.
    """
    reader = SafetensorsReader(path, mapped=False)
    ranges = {}
    for layer in range(num_layers):
        for linear in LINEARS:
            module = f"model.layers.{layer}.{linear}"
            x, y = (reader.tensor(f"{module}.{side}").astype(np.float32) for side in "xy")
            if not (np.isfinite(x).all() and np.isfinite(y).all() and x.max() > 0 and y.max() > 0):
                raise InputError(f"{path}: {module} has no usable range", "calibrate again")
            ranges[module] = ActivationRange(x, y)
    return ranges


def write_ranges(ranges: Mapping[str, ActivationRange], path: Path) -> None:
    """Write ranges for later use by `--act-ranges`."""
    tensors = {f"{module}.{side}": getattr(span, side) for module, span in ranges.items() for side in "xy"}
    plan = {name: TensorSpec(tensor.shape, np.dtype(np.float32)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, [tensor])

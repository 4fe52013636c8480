"""INT8 matrices in the compressed-tensors format, and smoothers, for which the format has no place.

Format (compressed-tensors 0.17): `int-quantized` holds int8 `weight` [out, in] and float32 `weight_scale` [out, 1];
`pack-quantized` holds codes + 128 as bytes of `weight_packed` int32 [out, in / 4], `weight_scale` [out, groups] in
the model's dtype, and `weight_shape`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trtqwen.safetensors_io.format import Array

GROUPS = (128, 64, 32)  # group sizes of vLLM's Marlin kernels


def packed(codes: Array) -> Array:
    """int32 [out, in / 4] of int8 [out, in]: four codes in a word, the first in the lowest byte."""
    return np.ascontiguousarray(codes.view(np.uint8) ^ np.uint8(0x80)).view("<i4")


def group_size(columns: int, part: int) -> int | None:
    """The largest group that divides a matrix's columns and each rank's part of them; None if there is none."""
    return next((size for size in GROUPS if columns % size == 0 and part % size == 0), None)


def group_scales(steps: Array, columns: int, part: int, size: int) -> Array:
    """[out, columns / size]: the step of the rank that each group belongs to.

    Args:
        steps: [out, ranks].
        part: columns of one rank, padding included.
    """
    return steps[:, np.arange(columns // size) * size // part]


def one_scale(codes: Array, steps: Array, part: int) -> tuple[Array, Array]:
    """Codes with one step for a whole row, [out], where each rank had its own: rounds a second time.

    Args:
        codes: int8 [out, in].
        steps: [out, ranks].
        part: columns of one rank, padding included.
    """
    wide = steps.astype(np.float32)
    largest = wide.max(axis=1)
    if wide.shape[1] == 1:
        return codes, largest
    safe = np.where(largest > 0, largest, np.float32(1))
    result = np.empty_like(codes)
    for rank in range(wide.shape[1]):
        columns = slice(rank * part, (rank + 1) * part)
        ratio = (wide[:, rank] / safe)[:, None]
        result[:, columns] = np.rint(codes[:, columns] * ratio).clip(-128, 127)
    return result, largest


def dequantized(codes: Array, scale: Array, smoother: Array | None, dtype: np.dtype[Any]) -> Array:
    """The matrix in 16 bits: code * scale / smoother."""
    result = np.empty(codes.shape, dtype)
    for start in range(0, len(codes), 1024):
        rows = slice(start, start + 1024)
        wide = codes[rows].astype(np.float32) * scale[rows, None]
        result[rows] = wide if smoother is None else wide / smoother
    return result


def shared_smoother(smoother: Array, heads: int, kv_heads: int, head_size: int) -> Array | None:
    """The smoother of `attention.dense` as divisors of the rows of v_proj, [kv_heads * head_size].

    Query heads that share a KV head read the same values, so their smoothers have to be equal.

    Args:
        smoother: [heads * head_size].

    Returns:
        None if they are not.
    """
    groups = smoother.reshape(kv_heads, heads // kv_heads, head_size)
    return groups[:, 0].reshape(-1) if (groups == groups[:, :1]).all() else None


def quantization_config(
    *, activations: bool, static: bool, ignore: list[str], groups: dict[int, list[str]]
) -> dict[str, Any]:
    """The `quantization_config` of a config.json.

    Args:
        activations: whether inputs are INT8 too; then the weights are not packed.
        static: whether the inputs' scales are calibrated.
        ignore: modules that stay in 16 bits.
        groups: modules whose weights have a scale for each group of this many columns.
    """
    inputs = None
    if activations:
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": not static}
        inputs["strategy"] = "tensor" if static else "token"
    schemes = []
    for size, modules in groups.items():
        schemes.append({"targets": modules, "weights": _weights("group", size), "input_activations": inputs})
    schemes.append({"targets": ["Linear"], "weights": _weights("channel", None), "input_activations": inputs})
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if activations else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        "kv_cache_scheme": None,
    }


def _weights(strategy: str, size: int | None) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    return weights | {"strategy": strategy, "group_size": size}

"""Linear layers of a checkpoint, in each precision it may hold: how their tensors are read and what they compute.

Each precision has a plain form in PyTorch's operators. On the CPU, floating matrices are packed for oneDNN, and INT8
matrices stay INT8 in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.diagnostics import CheckpointError
from trtqwen.nn.ops import to_torch
from trtqwen.quantize.weight_only import Int8Layout, dequantize, from_layout, quantize
from trtqwen.safetensors_io.format import Array

Tensors = Mapping[str, Array]
_DEQUANTIZE_FROM = 128  # rows from which a floating product pays for multiplying the weights out
_DEQUANTIZED_ROWS = 1024  # weight rows at a time: they stay in the cache
# oneDNN chooses the layout for a number of rows. The layout for 8 rows is 5 to 25 % faster than the one for any
# number, at 2 to 64 rows of a 0.5B model. Its kernel for four rows takes 14 ms where the one for one row takes 18.
_TYPICAL_ROWS, _LEAST_ROWS = 8, 4
_LARGE = 1 << 19  # weights of a matrix: below it, filling up rows takes longer than it saves


class Linear(Protocol):
    """One rank's share of a linear layer."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        ...


@dataclass(frozen=True)
class FloatLinear:
    """A matrix in the dtype of the computation, INT8 weight-only ones multiplied out.

    Attributes:
        weight: [out, in].
        bias: [out], or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class PackedLinear:
    """A matrix in the blocked layout of oneDNN's kernels: several times as fast as `FloatLinear` for a few tokens.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        self._bias = bias
        self._least_rows = _LEAST_ROWS if weight.numel() >= _LARGE else 1

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._multiply(hidden, "none")

    def silu(self, hidden: Tensor) -> Tensor:
        """SiLU of the product, in one pass."""
        return self._multiply(hidden, "swish")

    def times(self, hidden: Tensor, factor: Tensor) -> Tensor:
        """The product times `factor` [tokens, out], element by element, in one pass."""
        inputs, factors = self._filled(hidden), self._filled(factor)
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, factors, self._weight, self._bias, "mul")
        return output[: len(hidden)]

    def _multiply(self, hidden: Tensor, then: str) -> Tensor:
        inputs = self._filled(hidden)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, then, [], "")
        return output[: len(hidden)]

    def _filled(self, rows: Tensor) -> Tensor:
        missing = self._least_rows - len(rows)
        return F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


@dataclass(frozen=True)
class Int8Linear:
    """An INT8 weight-only matrix computed from its INT8 values.

    Attributes:
        weight: int8 [out, in].
        scale: float32 [out].
        bias: [out], or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        output = multiply_int8(hidden.float(), self.weight, self.scale)
        return (output if self.bias is None else output + self.bias).to(hidden.dtype)


def multiply_int8(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(rows @ weight.T) * scale, float32 [n, out], of float32 [n, in], int8 [out, in] and float32 [out]."""
    if len(rows) > _DEQUANTIZE_FROM:
        pieces = [F.linear(rows, part.float()) for part in torch.split(weight, _DEQUANTIZED_ROWS)]
        return torch.cat(pieces, dim=1).mul_(scale)
    from trtqwen.executor.cpu.int8 import int8_matmul

    output = torch.empty(len(rows), len(weight))
    int8_matmul(rows.contiguous().numpy(), weight.numpy(), scale.numpy(), output.numpy())
    return output


@dataclass(frozen=True)
class SmoothQuantLinear:
    """INT8 times INT8, as TensorRT-LLM's SmoothQuant plugin computes it.

    Attributes:
        weight: int8 values, [out, in], as float32 or int8.
        scale: `per_channel_scale`, [1, out] or [1, 1].
        bias: [out], or None.
        smoother: [in]; divides the input where no norm has done so.
        to_int: factor from the input to its int8 code; None takes each token's own range.
        act_scale: with `to_int`: multiplies `scale`, which NVIDIA's converter writes relative to the output's range.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    smoother: Tensor | None
    to_int: Tensor | None
    act_scale: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        wide = hidden.float() if self.smoother is None else hidden.float() / self.smoother
        if self.to_int is None:
            step = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127.0
            codes = (wide / step).round()
        else:
            assert self.act_scale is not None
            step = self.act_scale
            codes = (wide * self.to_int).round().clamp(-128, 127)
        if self.weight.dtype == torch.int8:
            output = multiply_int8(codes, self.weight, self.scale.expand(1, len(self.weight))[0].contiguous()) * step
        else:
            output = F.linear(codes, self.weight) * step * self.scale
        return (output if self.bias is None else output + self.bias).to(hidden.dtype)


class LinearLoader:
    """Makes the linear layers of one rank from its tensors.

    Args:
        int8_layout: how the checkpoint's INT8 weight-only matrices lie, if it has them.
        dtype: of the computation.
        plain: use PyTorch's operators alone, and INT8 weights multiplied out.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        int8_layout: Int8Layout | None,
        dtype: torch.dtype,
        device: torch.device,
        *,
        plain: bool = True,
    ) -> None:
        self._config = config
        self._algo = config.quantization.quant_algo or ""
        self._int8_layout = int8_layout
        self._dtype = dtype
        self._device = device
        self._plain = plain
        self._packs = not plain and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

    def load(self, tensors: Tensors, name: str, to_int: str) -> Linear:
        """One linear layer.

        Args:
            name: such as `transformer.layers.0.mlp.fc`.
            to_int: name of the tensor that scales its input with static SmoothQuant.

        Raises:
            CheckpointError: if a tensor is missing or the precision is unknown.
        """
        weight, bias = need(tensors, f"{name}.weight"), tensors.get(f"{name}.bias")
        if self._algo.startswith("W8A8_SQ_") and self._algo.endswith("_PLUGIN"):
            return self._smooth(tensors, name, to_int)
        if self._algo == "W8A16":
            return self._weight_only(tensors, name, bias)
        if self._algo:
            raise CheckpointError(
                f"quantization.quant_algo {self._algo} is not computed by the torch engine", "use tensorrt_llm"
            )
        return self.floating(self._to(to_torch(weight)), self._maybe(bias))

    def floating(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A floating matrix [out, in] as this host multiplies it best."""
        return PackedLinear(weight, bias) if self._packs else FloatLinear(weight, bias)

    def _weight_only(self, tensors: Tensors, name: str, bias: Array | None) -> Linear:
        codes, steps = self._codes(tensors, name)
        if self._plain:
            return FloatLinear(self._to(torch.from_numpy(dequantize(codes, steps))), self._maybe(bias))
        return Int8Linear(
            torch.from_numpy(codes.copy()),
            torch.from_numpy(steps.astype(np.float32)),
            None if bias is None else self._wide(bias),
        )

    def _codes(self, tensors: Tensors, name: str) -> tuple[Array, Array]:
        """INT8 values [out, in], and steps [out]."""
        stored = tensors[f"{name}.weight"]
        if stored.dtype == np.int8:
            if self._int8_layout is None:
                raise CheckpointError(
                    f"{name}.weight is INT8, but its layout is not recorded", "convert the model again"
                )
            scale = need(tensors, f"{name}.per_channel_scale")
            return from_layout(stored, self._int8_layout), scale
        codes, steps = quantize(stored)  # plain: as TensorRT-LLM does when it builds
        return codes, steps.astype(stored.dtype)

    def _smooth(self, tensors: Tensors, name: str, to_int: str) -> SmoothQuantLinear:
        static = not self._algo.endswith("PER_TOKEN_PLUGIN")
        smoother, weight = tensors.get(f"{name}.smoother"), need(tensors, f"{name}.weight")
        return SmoothQuantLinear(
            weight=self._wide(weight) if self._plain else to_torch(weight),
            scale=self._wide(need(tensors, f"{name}.per_channel_scale")),
            bias=None if f"{name}.bias" not in tensors else self._wide(tensors[f"{name}.bias"]),
            smoother=None if smoother is None else self._wide(smoother[0]),
            to_int=self._wide(need(tensors, to_int)) if static else None,
            act_scale=self._wide(need(tensors, f"{name}.act_scale")) if static else None,
        )

    def _wide(self, tensor: Array) -> Tensor:
        return to_torch(tensor).to(self._device, torch.float32)

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)

    def _maybe(self, tensor: Array | None) -> Tensor | None:
        return None if tensor is None else self._to(to_torch(tensor))


def check_activation(config: CheckpointConfig) -> None:
    """Refuse a checkpoint whose MLP goes through another function than SiLU.

    Raises:
        CheckpointError: naming it.
    """
    if config.hidden_act != "silu":
        raise CheckpointError(f"the torch engine does not compute hidden_act {config.hidden_act}", "only silu")


def need(tensors: Tensors, name: str) -> Array:
    """A tensor that must be there.

    Raises:
        CheckpointError: if it is not.
    """
    try:
        return tensors[name]
    except KeyError:
        raise CheckpointError(f"tensor {name!r} is missing from the rank file", "convert the model again") from None

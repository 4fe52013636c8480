"""Linear layers on CUDA: their tensors on the card, and the kernel for each number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.diagnostics import CheckpointError
from trtqwen.executor.cuda.kernels import silu_matmul
from trtqwen.executor.cuda.kernels.activation import silu_mul
from trtqwen.executor.cuda.kernels.gemv import gemv
from trtqwen.executor.cuda.kernels.int8_matmul import w8a8, w8a16
from trtqwen.executor.cuda.kernels.matmul import matmul
from trtqwen.executor.cuda.kernels.quantize import PER_TOKEN, STATIC, Quantization, Quantized
from trtqwen.executor.cuda.weights import Uploader, from_layout, quantize_weights, to_float
from trtqwen.executor.linear import Tensors, need
from trtqwen.quantize.weight_only import Int8Layout

Activation = Tensor | Quantized


@dataclass(frozen=True)
class Norm:
    """An RMS norm before a linear layer."""

    gain: Tensor
    epsilon: float


class Linear(Protocol):
    """One rank's share of a linear layer, or of several that share their input."""

    @property
    def quantization(self) -> Quantization | None:
        """The quantization of its input; None for an unquantized input."""
        ...

    def __call__(self, hidden: Activation) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        ...


@dataclass(frozen=True)
class HalfLinear:
    """A matrix in the dtype of the computation, [out, in]."""

    weight: Tensor
    bias: Tensor | None
    quantization: Quantization | None = None

    def __call__(self, hidden: Activation) -> Tensor:
        assert isinstance(hidden, Tensor)
        return matmul(hidden, self.weight, self.bias)

    def single(
        self, hidden: Tensor, *, norm: Norm | None = None, silu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """Compute one token, together with the operations before and after the product; see `gemv`."""
        return _single(self, None, hidden, norm, silu, residual)

    def silu(self, hidden: Activation) -> Tensor:
        """Of two matrices in one, `silu(first) * second`."""
        assert isinstance(hidden, Tensor)
        if self.bias is None and silu_matmul.pays(hidden):
            return silu_matmul.silu_matmul(hidden, self.weight)
        active = silu_mul(self(hidden), None)
        assert isinstance(active, Tensor)
        return active


@dataclass(frozen=True)
class SmoothQuantLinear:
    """INT8 times INT8; see `executor.linear.SmoothQuantLinear`.

    Attributes:
        scales: float32 [out], the calibrated step of the input included where it has one.
        bias: float32 [out], or None.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    quantization: Quantization | None
    dtype: torch.dtype

    def __call__(self, hidden: Activation) -> Tensor:
        assert isinstance(hidden, Quantized)
        return w8a8(hidden, self.weight, self.scales, self.bias, self.dtype)


def fold_smoother(gate_up: SmoothQuantLinear, proj: SmoothQuantLinear) -> tuple[SmoothQuantLinear, SmoothQuantLinear]:
    """Divide by the smoother of `proj` where the up matrix scales its products: exact but for rounding to 16 bits.

    A kernel that reads the float32 smoother for each token reads as much of it as of the activations: on an H200 SiLU
    and quantization of 16,384 tokens of a 7B model took 560 us, and take 421 without it.
    """
    if proj.quantization is None or proj.quantization.inverse_smoother is None:
        return gate_up, proj
    inverse = proj.quantization.inverse_smoother
    factor = torch.cat([torch.ones_like(inverse), inverse])
    bias = None if gate_up.bias is None else gate_up.bias * factor
    unsmoothed = replace(proj.quantization, inverse_smoother=None)
    return replace(gate_up, scales=gate_up.scales * factor, bias=bias), replace(proj, quantization=unsmoothed)


@dataclass(frozen=True)
class WeightOnlyLinear:
    """16-bit activations times INT8 weights.

    Attributes:
        weight: int8 [out, in].
        scales: float32 [out].
        scratch: room for one dequantized matrix, shared by all layers.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    scratch: Tensor
    quantization: Quantization | None = None

    def __call__(self, hidden: Activation) -> Tensor:
        assert isinstance(hidden, Tensor)
        return w8a16(hidden, self.weight, self.scales, self.bias, self.scratch)

    def single(
        self, hidden: Tensor, *, norm: Norm | None = None, silu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """Compute one token, together with the operations before and after the product; see `gemv`."""
        return _single(self, self.scales, hidden, norm, silu, residual)


def _single(
    linear: HalfLinear | WeightOnlyLinear,
    scales: Tensor | None,
    hidden: Tensor,
    norm: Norm | None,
    silu: bool,
    residual: Tensor | None,
) -> Tensor:
    return gemv(
        hidden,
        linear.weight,
        hidden.dtype,
        scales=scales,
        bias=linear.bias,
        gain=norm.gain if norm else None,
        epsilon=norm.epsilon if norm else 0.0,
        silu=silu,
        residual=residual,
    )


class LinearLoader:
    """Makes linear layers from a rank's tensors.

    Args:
        int8_layout: how INT8 weight-only matrices lie in the file.
    """

    def __init__(
        self, config: CheckpointConfig, int8_layout: Int8Layout | None, dtype: torch.dtype, upload: Uploader
    ) -> None:
        self._algo = config.quantization.quant_algo or ""
        self._int8_layout = int8_layout
        self._dtype = dtype
        self._upload = upload
        self._scratch = torch.empty(0)

    def load(self, tensors: Tensors, names: Sequence[str], to_int: str) -> Linear:
        """One linear layer, or several with the same input as one, with concatenated outputs.

        Args:
            names: such as `transformer.layers.0.mlp.fc`.
            to_int: name of the tensor that scales their input with static SmoothQuant.

        Raises:
            CheckpointError: if a tensor is missing or the precision is unknown.
        """
        if self._algo.startswith("W8A8_SQ_") and self._algo.endswith("_PLUGIN"):
            return self._smooth(tensors, names, to_int)
        if self._algo == "W8A16":
            return self._weight_only(tensors, names)
        if self._algo:
            raise CheckpointError(
                f"quantization.quant_algo {self._algo} is not computed by the torch engine", "use tensorrt_llm"
            )
        weight = self._upload(*(need(tensors, f"{name}.weight") for name in names)).to(self._dtype)
        return HalfLinear(weight, self._bias(tensors, names, self._dtype))

    def _smooth(self, tensors: Tensors, names: Sequence[str], to_int: str) -> SmoothQuantLinear:
        static = not self._algo.endswith("PER_TOKEN_PLUGIN")
        weight = self._upload(*(need(tensors, f"{name}.weight") for name in names))
        scales = []
        for name in names:
            out = len(need(tensors, f"{name}.weight"))
            scale = np.asarray(need(tensors, f"{name}.per_channel_scale"), np.float32).reshape(-1)
            if static:
                scale = scale * np.asarray(need(tensors, f"{name}.act_scale"), np.float32).reshape(-1)
            scales.append(np.broadcast_to(scale, (out,)))
        smoother = tensors.get(f"{names[0]}.smoother")
        return SmoothQuantLinear(
            weight=weight,
            scales=self._upload(np.concatenate(scales)),
            bias=self._bias(tensors, names, torch.float32),
            quantization=Quantization(
                mode=STATIC if static else PER_TOKEN,
                to_int=to_float(need(tensors, to_int)) if static else 1.0,
                inverse_smoother=None if smoother is None else 1.0 / self._upload(smoother).float().view(-1),
            ),
            dtype=self._dtype,
        )

    def _weight_only(self, tensors: Tensors, names: Sequence[str]) -> Linear:
        parts = []
        for name in names:
            stored = need(tensors, f"{name}.weight")
            weight = self._upload(stored)
            if stored.dtype != np.int8:  # plain: quantized here, as TensorRT-LLM does when it builds
                codes, steps = quantize_weights(weight, (stored,))
                parts.append((codes, steps.to(weight.dtype)))
            elif self._int8_layout is None:
                raise CheckpointError(
                    f"{name}.weight is INT8, but its layout is not recorded", "convert the model again"
                )
            else:
                scale = self._upload(need(tensors, f"{name}.per_channel_scale"))
                parts.append((from_layout(weight, self._int8_layout), scale))
        codes = torch.cat([part[0] for part in parts])
        if self._scratch.numel() < codes.numel():
            self._scratch = torch.empty(codes.numel(), dtype=self._dtype, device=codes.device)
        scales = torch.cat([part[1] for part in parts]).float().view(-1)
        return WeightOnlyLinear(codes, scales, self._bias(tensors, names, self._dtype), self._scratch)

    def _bias(self, tensors: Tensors, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
        biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
        return self._upload(*biases).to(dtype) if biases else None

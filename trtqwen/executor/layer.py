"""One decoder layer of one tensor-parallel rank: everything but attention itself and the sums over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.executor.linear import LinearLoader, PackedLinear, Tensors, need
from trtqwen.nn.ops import rms_norm, to_torch
from trtqwen.nn.rotary import rotate


class RankLayer:
    """A rank's share of a decoder layer. The outputs of `dense` and `mlp` are partial: their sum over ranks counts.

    Args:
        tensors: the rank's tensors.
        prefix: `transformer.layers.<local index>`.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        tensors: Tensors,
        prefix: str,
        loader: LinearLoader,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config = config
        self._gains = {
            name: to_torch(need(tensors, f"{prefix}.{name}.weight")).to(device, dtype)
            for name in ("input_layernorm", "post_layernorm")
        }
        attention, mlp = f"{prefix}.attention", f"{prefix}.mlp"
        self._qkv = loader.load(tensors, f"{attention}.qkv", f"{prefix}.input_layernorm.scale_to_int")
        self._dense = loader.load(tensors, f"{attention}.dense", f"{attention}.quantization_scaling_factor")
        self._fc = loader.load(tensors, f"{mlp}.fc", f"{prefix}.post_layernorm.scale_to_int")
        self._gate = loader.load(tensors, f"{mlp}.gate", f"{prefix}.post_layernorm.scale_to_int")
        self._proj = loader.load(tensors, f"{mlp}.proj", f"{mlp}.quantization_scaling_factor")
        self._kv_step: float | None = None
        if config.quantization.kv_cache_quant_algo == "INT8":
            self._kv_step = float(need(tensors, f"{attention}.kv_cache_scaling_factor")[0])

    def qkv(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the layer's input [tokens, hidden] to rotated queries, rotated keys and values as the KV cache holds
        them, each [tokens, heads, head_size].
        """
        config = self._config
        packed = self._qkv(self._norm(hidden, "input_layernorm")).view(len(hidden), -1, config.head_size)
        heads, kv_heads = config.local_heads, config.local_kv_heads
        query, key, value = torch.split(packed, [heads, kv_heads, kv_heads], dim=1)
        return rotate(query, cos, sin), self._stored(rotate(key, cos, sin)), self._stored(value)

    def dense(self, attended: Tensor) -> Tensor:
        """This rank's part of the attention output, [tokens, hidden], of [tokens, heads, head_size]."""
        return self._dense(attended.flatten(1))

    def mlp(self, hidden: Tensor) -> Tensor:
        """This rank's part of the MLP's output, [tokens, hidden]."""
        normed = self._norm(hidden, "post_layernorm")
        # In TensorRT-LLM `fc` goes through SiLU (Hugging Face's gate_proj) and `gate` does not (up_proj).
        if isinstance(self._fc, PackedLinear) and isinstance(self._gate, PackedLinear):
            return self._proj(self._gate.times(normed, self._fc.silu(normed)))
        return self._proj(F.silu(self._fc(normed)) * self._gate(normed))

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return rms_norm(hidden, self._gains[name], self._config.norm_epsilon)

    def _stored(self, tensor: Tensor) -> Tensor:
        if self._kv_step is None:
            return tensor
        return (tensor / self._kv_step).round().clamp(-128, 127) * self._kv_step

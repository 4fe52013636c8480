"""A Hugging Face Qwen2 computed layer by layer: one decoder layer in memory at a time, for any model size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.hf.source import HfModel
from trtqwen.nn.ops import rms_norm, to_torch
from trtqwen.nn.rotary import make_rotary, rotate

Observer = Callable[[str, Tensor, Tensor], None]
"""Called with a linear layer's Hugging Face module name, its input [tokens, in] and its output [tokens, out]."""

_HEAD_ROWS = 16384


class LayerwiseModel:
    """Computes hidden states of whole sequences [tokens, hidden], one layer for all of them, then the next.

    Args:
        dtype: weights and activations are rounded to it after every operation.
        compute: dtype of the matrix products; CPUs have no fast float16 ones.
    """

    def __init__(self, source: HfModel, dtype: torch.dtype, device: torch.device, compute: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device
        self._compute = compute
        config = source.config
        self._rotary = make_rotary(config.rope_theta, config.head_size, config.rope_scaling, device)

    @property
    def num_layers(self) -> int:
        return self._source.config.num_hidden_layers

    def embed(self, token_ids: list[int]) -> Tensor:
        """Embeddings of a sequence, [tokens, hidden]; reads only the rows asked for."""
        rows = self._source.rows("model.embed_tokens.weight", token_ids)
        return to_torch(rows).to(self._device, self._dtype)

    def layer(self, index: int) -> DecoderLayer:
        """Load one decoder layer."""
        prefix = f"model.layers.{index}."
        weights = {}
        for name in (name for name in self._source if name.startswith(prefix)):
            weight = to_torch(self._source.tensor(name)).to(self._device, self._dtype)
            weights[name.removeprefix(prefix)] = weight.to(self._compute) if "_proj." in name else weight
            self._source.finish(name)
        return DecoderLayer(self._source.config, prefix, weights, self._rotary, self._compute)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [tokens, vocab] of final hidden states; the head is read in blocks."""
        config = self._source.config
        gain = to_torch(self._source.tensor("model.norm.weight")).to(self._device, self._dtype)
        normed = rms_norm(hidden, gain, config.rms_norm_eps).to(self._compute)
        head = self._source.tensor("model.embed_tokens.weight" if self._source.tied else "lm_head.weight")
        blocks = [
            F.linear(
                normed, to_torch(head[start : start + _HEAD_ROWS]).to(self._device, self._dtype).to(self._compute)
            )
            for start in range(0, len(head), _HEAD_ROWS)
        ]
        return torch.cat(blocks, dim=-1).to(self._dtype).float()


class DecoderLayer:
    """One decoder layer with its weights: those of linear layers in the dtype of the products."""

    def __init__(
        self, config: Any, prefix: str, weights: dict[str, Tensor], rotary: Any, compute: torch.dtype
    ) -> None:
        self._config = config
        self._prefix = prefix
        self._weights = weights
        self._rotary = rotary
        self._compute = compute

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, observe: Observer | None = None) -> Tensor:
        """The next hidden states of one sequence, [tokens, hidden]."""
        hidden = hidden + self.attention(hidden, observe)
        return hidden + self.mlp(hidden, observe)

    @torch.inference_mode()
    def mlp(self, hidden: Tensor, observe: Observer | None = None) -> Tensor:
        """What the MLP adds to the hidden states, [tokens, hidden]."""
        normed = self._norm(hidden, "post_attention_layernorm")
        inner = F.silu(self._linear(normed, "mlp.gate_proj", observe)) * self._linear(normed, "mlp.up_proj", observe)
        return self._linear(inner, "mlp.down_proj", observe)

    @torch.inference_mode()
    def attention(self, hidden: Tensor, observe: Observer | None = None) -> Tensor:
        """What attention adds to the hidden states of one sequence, [tokens, hidden]."""
        size, tokens = self._config.head_size, len(hidden)
        normed = self._norm(hidden, "input_layernorm")
        query, key, value = (
            self._linear(normed, f"self_attn.{letter}_proj", observe).view(tokens, -1, size) for letter in "qkv"
        )
        cos, sin = self._rotary.cos_sin(torch.arange(tokens, device=hidden.device), hidden.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (tensor.transpose(0, 1)[None].to(self._compute) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0]
        return self._linear(
            attended.transpose(0, 1).reshape(tokens, -1).to(hidden.dtype), "self_attn.o_proj", observe
        )

    def _linear(self, hidden: Tensor, name: str, observe: Observer | None) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        output = F.linear(hidden.to(self._compute), weight, bias).to(hidden.dtype)
        if observe is not None:
            observe(self._prefix + name, hidden, output)
        return output

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return rms_norm(hidden, self._weights[f"{name}.weight"], self._config.rms_norm_eps)

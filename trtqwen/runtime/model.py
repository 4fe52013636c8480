"""Qwen2 on one tensor-parallel rank, reading the checkpoint's own tensors: packed tokens in, logits out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.errors import CheckpointError
from trtqwen.runtime.attention import AttentionBackend, AttentionBatch
from trtqwen.runtime.parallel import Communicator
from trtqwen.safetensors_io import Array


class Qwen2Model:
    """The layers of one rank and their paged KV cache.

    Args:
        weights: names and tensors of this rank's checkpoint file.
        dtype: dtype of the computation and of the KV cache.
        num_blocks: KV cache blocks of each layer.

    Raises:
        CheckpointError: if a tensor is missing, or the checkpoint asks for what this engine does not compute.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        weights: Iterable[tuple[str, Array]],
        communicator: Communicator,
        attention: AttentionBackend,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        tokens_per_block: int,
    ) -> None:
        _check_supported(config)
        self._config = config
        self._communicator = communicator
        self._attention = attention
        self._weights = {name: _to_torch(tensor).to(device, dtype) for name, tensor in weights}
        shape = (config.num_hidden_layers, 2, num_blocks, config.local_kv_heads, tokens_per_block, config.head_size)
        self._kv_cache = torch.zeros(shape, dtype=dtype, device=device)
        exponents = torch.arange(0, config.head_size, 2, device=device).float() / config.head_size
        self._inverse_frequencies = 1.0 / config.rotary_base**exponents

    @torch.inference_mode()
    def forward(self, batch: AttentionBatch) -> Tensor | None:
        """Compute a step's tokens and put their keys and values into the cache.

        Returns:
            float32 logits of the sampled rows, [rows, vocab_size], on rank 0; None on the other ranks.
        """
        hidden = F.embedding(batch.token_ids, self._weight("transformer.vocab_embedding.weight"))
        cos, sin = self._rotary(batch.positions)
        for layer in range(self._config.num_hidden_layers):
            prefix = f"transformer.layers.{layer}"
            normed = self._norm(hidden, f"{prefix}.input_layernorm.weight")
            hidden = hidden + self._attend(normed, layer, cos, sin, batch)
            normed = self._norm(hidden, f"{prefix}.post_layernorm.weight")
            hidden = hidden + self._mlp(normed, f"{prefix}.mlp")
        hidden = self._norm(hidden[batch.sampled_rows], "transformer.ln_f.weight")
        logits = self._communicator.gather(F.linear(hidden, self._weight("lm_head.weight")))
        return None if logits is None else logits[:, : self._config.vocab_size].float()

    def _attend(self, hidden: Tensor, layer: int, cos: Tensor, sin: Tensor, batch: AttentionBatch) -> Tensor:
        config, prefix = self._config, f"transformer.layers.{layer}.attention"
        packed = F.linear(hidden, self._weight(f"{prefix}.qkv.weight"), self._weight(f"{prefix}.qkv.bias"))
        heads, kv_heads = config.local_heads, config.local_kv_heads
        split = packed.view(len(hidden), -1, config.head_size)
        query, key, value = torch.split(split, [heads, kv_heads, kv_heads], dim=1)
        keys, values = self._kv_cache[layer]
        block, offset = batch.slots // keys.shape[2], batch.slots % keys.shape[2]
        keys[block, :, offset] = _rotate(key, cos, sin)
        values[block, :, offset] = value
        attended = self._attention(_rotate(query, cos, sin), keys, values, batch)
        return self._communicator.all_reduce(F.linear(attended.flatten(1), self._weight(f"{prefix}.dense.weight")))

    def _mlp(self, hidden: Tensor, prefix: str) -> Tensor:
        # In TensorRT-LLM `fc` goes through SiLU (Hugging Face's gate_proj) and `gate` does not (up_proj).
        inner = F.silu(F.linear(hidden, self._weight(f"{prefix}.fc.weight")))
        inner = inner * F.linear(hidden, self._weight(f"{prefix}.gate.weight"))
        return self._communicator.all_reduce(F.linear(inner, self._weight(f"{prefix}.proj.weight")))

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._config.norm_epsilon)
        return self._weight(name) * wide.to(hidden.dtype)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self._inverse_frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # [tokens, 1, head_size]
        dtype = self._kv_cache.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _weight(self, name: str) -> Tensor:
        try:
            return self._weights[name]
        except KeyError:
            raise CheckpointError(
                f"rank{self._communicator.rank}.safetensors: tensor {name!r} is missing; convert the model again"
            ) from None


def _rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of GPT-NeoX style: the first half of a head turns against its second half."""
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos + torch.cat([-second, first], dim=-1) * sin


def _to_torch(tensor: Array) -> Tensor:
    if tensor.dtype.name == "bfloat16":  # torch does not know numpy's extension dtypes
        return torch.from_numpy(tensor.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.copy())


def _check_supported(config: CheckpointConfig) -> None:
    quantization = config.quantization
    wrong = {
        "quantization.quant_algo": quantization.quant_algo,
        "quantization.kv_cache_quant_algo": quantization.kv_cache_quant_algo,
        "rotary_scaling": config.rotary_scaling,
        "use_parallel_embedding": config.use_parallel_embedding or None,
        "mapping.pp_size": None if config.mapping.pp_size == 1 else config.mapping.pp_size,
        "hidden_act": None if config.hidden_act == "silu" else config.hidden_act,
    }
    for name, value in wrong.items():
        if value is not None:
            raise CheckpointError(f"the torch engine does not compute {name} = {value}; use the tensorrt_llm builder")

"""Qwen2 on one rank, reading the checkpoint's own tensors: packed tokens in, logits out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.checkpoint.config import CheckpointConfig
from trtqwen.executor.attention import AttentionBackend, AttentionBatch
from trtqwen.executor.layer import RankLayer
from trtqwen.executor.linear import LinearLoader, Tensors, check_activation, need
from trtqwen.executor.parallel import Communicator
from trtqwen.nn.ops import rms_norm, to_torch
from trtqwen.nn.rotary import make_rotary
from trtqwen.quantize.weight_only import Int8Layout


class Qwen2Model:
    """One rank's share of the model: its pipeline stage's layers, its heads of them, and their paged KV cache.

    Args:
        tensors: this rank's checkpoint file.
        int8_layout: how INT8 weight-only matrices lie in it.
        dtype: dtype of the computation and of the KV cache.
        num_blocks: KV cache blocks of each layer.
        plain: use PyTorch's operators alone.

    Raises:
        CheckpointError: if a tensor is missing, or the checkpoint asks for what this engine does not compute.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        tensors: Tensors,
        communicator: Communicator,
        attention: AttentionBackend,
        *,
        int8_layout: Int8Layout | None,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        tokens_per_block: int,
        plain: bool = True,
    ) -> None:
        check_activation(config)
        self._config = config
        self._communicator = communicator
        self._attention = attention
        self._dtype = dtype
        self._device = device
        loader = LinearLoader(config, int8_layout, dtype, device, plain=plain)
        count = len(config.rank_mapping.stage_layers(communicator.stage, config.num_hidden_layers))
        self._layers = [
            RankLayer(config, tensors, f"transformer.layers.{index}", loader, dtype, device) for index in range(count)
        ]
        self._embedding = (
            self._table(tensors, "transformer.vocab_embedding.weight") if communicator.is_first else None
        )
        self._gain = self._table(tensors, "transformer.ln_f.weight") if communicator.is_last else None
        self._head = loader.floating(self._table(tensors, "lm_head.weight"), None) if communicator.is_last else None
        self._rotary = make_rotary(config.rotary_base, config.head_size, config.rotary_scaling, device)
        shape = (count, 2, num_blocks, config.local_kv_heads, tokens_per_block, config.head_size)
        self._kv_cache = torch.zeros(shape, dtype=dtype, device=device)

    @torch.inference_mode()
    def forward(self, batch: AttentionBatch) -> Tensor | None:
        """Compute a step's tokens and put their keys and values into the cache.

        Returns:
            float32 logits of the rows that want them, [rows, vocab_size], on rank 0; None on the other ranks.
        """
        communicator = self._communicator
        if self._embedding is not None:
            hidden = self._embed(batch.token_ids, self._embedding)
        else:
            shape = (len(batch.token_ids), self._config.hidden_size)
            hidden = communicator.receive(torch.empty(shape, dtype=self._dtype, device=self._device))
        cos, sin = self._rotary.cos_sin(batch.positions, self._dtype)
        for layer, cache in zip(self._layers, self._kv_cache, strict=True):
            hidden = hidden + communicator.all_reduce(self._attend(layer, cache, hidden, cos, sin, batch))
            hidden = hidden + communicator.all_reduce(layer.mlp(hidden))
        if self._gain is None or self._head is None:
            communicator.send(hidden)
            logits = None
        else:
            hidden = rms_norm(hidden[batch.logit_rows], self._gain, self._config.norm_epsilon)
            logits = communicator.gather(self._head(hidden))
        padded = -(-self._config.vocab_size // communicator.tp_size) * communicator.tp_size
        rows = torch.empty(len(batch.logit_rows), padded, dtype=self._dtype, device=self._device)
        logits = communicator.to_rank_0(logits, rows)
        return None if logits is None else logits[:, : self._config.vocab_size].float()

    def _attend(
        self, layer: RankLayer, cache: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, batch: AttentionBatch
    ) -> Tensor:
        query, key, value = layer.qkv(hidden, cos, sin)
        keys, values = cache
        self._attention.store(key, value, keys, values, batch)
        return layer.dense(self._attention(query, keys, values, batch))

    def _embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        config, communicator = self._config, self._communicator
        if not config.use_parallel_embedding:
            return F.embedding(token_ids, table)
        if config.embedding_sharding_dim == 1:
            return communicator.all_gather(F.embedding(token_ids, table))
        local = token_ids - communicator.tp_rank * len(table)
        mine = (local >= 0) & (local < len(table))
        rows = F.embedding(local.clamp(0, len(table) - 1), table)
        return communicator.all_reduce(rows * mine[:, None])

    def _table(self, tensors: Tensors, name: str) -> Tensor:
        return to_torch(need(tensors, name)).to(self._device, self._dtype)

"""Attention on the CPU: context sequences one by one, all generation sequences in one padded call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trtqwen.executor.attention.base import AttentionBatch, GenerationBatch, SequenceSpan
from trtqwen.executor.attention.plain import causal_mask, gather


class CpuAttention:
    """Fused scaled-dot-product attention from PyTorch over gathered blocks."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        output = torch.empty_like(query)
        for span in batch.context:
            output[span.begin : span.end] = self._context(query[span.begin : span.end], keys, values, span)
        if batch.generation is not None:
            rows = batch.generation.rows
            output[rows] = self._generation(query[rows], keys, values, batch.generation)
        return output

    def _context(self, query: Tensor, keys: Tensor, values: Tensor, span: SequenceSpan) -> Tensor:
        whole = span.num_tokens == span.context_length
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            gather(keys, span)[None],
            gather(values, span)[None],
            attn_mask=None if whole else causal_mask(span, query.device),
            is_causal=whole,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1)

    def _generation(self, query: Tensor, keys: Tensor, values: Tensor, batch: GenerationBatch) -> Tensor:
        size, heads, head_size = query.shape
        kv_heads = keys.shape[1]
        key, value = (cache[batch.block_ids].transpose(1, 2).flatten(2, 3) for cache in (keys, values))
        mask = torch.arange(key.shape[2], device=query.device) < batch.lengths[:, None]
        # The query heads that share a KV head stand where tokens usually do: keys are read once for all of them.
        grouped = query.view(size, kv_heads, heads // kv_heads, head_size)
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask[:, None, None])
        return attended.reshape(size, heads, head_size)

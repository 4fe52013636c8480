"""The plain implementation: the formula for one sequence at a time. The fast ones are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from trtqwen.executor.attention.base import AttentionBatch, SequenceSpan


class PlainAttention:
    """softmax(q k^T / sqrt(head_size)) v over each sequence's gathered blocks, in float32."""

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> None:
        block, offset = batch.slots // keys.shape[2], batch.slots % keys.shape[2]
        keys[block, :, offset] = key
        values[block, :, offset] = value

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        return torch.cat([self._sequence(query[s.begin : s.end], keys, values, s) for s in batch.spans])

    def _sequence(self, query: Tensor, keys: Tensor, values: Tensor, span: SequenceSpan) -> Tensor:
        groups = query.shape[1] // keys.shape[1]
        key = gather(keys, span).repeat_interleave(groups, dim=0).float()
        value = gather(values, span).repeat_interleave(groups, dim=0).float()
        scores: Tensor = query.transpose(0, 1).float() @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~causal_mask(span, query.device), float("-inf"))
        attended: Tensor = scores.softmax(dim=-1) @ value
        return attended.transpose(0, 1).to(query.dtype)


def gather(cache: Tensor, span: SequenceSpan) -> Tensor:
    """A sequence's keys or values in order of position, [kv_heads, context_length, head_size]."""
    blocks = cache[span.block_ids]  # [blocks, kv_heads, tokens_per_block, head_size]
    return blocks.transpose(0, 1).flatten(1, 2)[:, : span.context_length]


def causal_mask(span: SequenceSpan, device: torch.device) -> Tensor:
    """Which positions each of the span's tokens sees, bool [tokens, context_length]."""
    last = torch.arange(span.context_length - span.num_tokens, span.context_length, device=device)
    return torch.arange(span.context_length, device=device) <= last[:, None]

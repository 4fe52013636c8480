"""Whole prompts through PyTorch's flash attention, which reads keys and values where the projection left them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholePrompts:
    """Prompts of a step that begin at position 0; they lie one behind the other.

    Attributes:
        begin, end: their packed rows.
        begins: int32 [prompts + 1], the first row of each, counted from `begin`, and the end of the last.
        longest: tokens of the longest.
    """

    begin: int
    end: int
    begins: Tensor
    longest: int


def flash_attention(qkv: Tensor, kv_heads: int, head_size: int, prompts: WholePrompts, out: Tensor) -> None:
    """Causal attention of whole prompts, into their rows of `out`.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * head_size], queries and keys rotated.
        out: [tokens, heads * head_size].
    """
    rows = qkv[prompts.begin : prompts.end].view(prompts.end - prompts.begin, -1, head_size)
    heads = rows.shape[1] - 2 * kv_heads
    query, key, value = rows.split([heads, kv_heads, kv_heads], dim=1)
    attended = torch.ops.aten._flash_attention_forward(
        query, key, value, prompts.begins, prompts.begins, prompts.longest, prompts.longest, 0.0, True, False
    )[0]
    out[prompts.begin : prompts.end] = attended.flatten(1)

"""Attention over the paged KV cache: one interface, a plain implementation and a fast one."""

from trtqwen.runtime.attention.base import AttentionBackend, AttentionBatch, SequenceSpan
from trtqwen.runtime.attention.cpu import CpuAttention
from trtqwen.runtime.attention.plain import PlainAttention

__all__ = ["AttentionBackend", "AttentionBatch", "CpuAttention", "PlainAttention", "SequenceSpan"]

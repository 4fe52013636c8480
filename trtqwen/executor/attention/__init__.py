"""Attention over the paged KV cache: one interface, a plain implementation and a fast one."""

from trtqwen.executor.attention.base import AttentionBackend, AttentionBatch, SequenceSpan
from trtqwen.executor.attention.cpu import CpuAttention
from trtqwen.executor.attention.plain import PlainAttention

__all__ = ["AttentionBackend", "AttentionBatch", "CpuAttention", "PlainAttention", "SequenceSpan"]

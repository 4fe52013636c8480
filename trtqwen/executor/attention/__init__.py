"""Attention over the paged KV cache: an interface, a plain implementation, and fast ones (`cpu`, imported on use)."""

from trtqwen.executor.attention.base import AttentionBackend, AttentionBatch, SequenceSpan
from trtqwen.executor.attention.plain import PlainAttention

__all__ = ["AttentionBackend", "AttentionBatch", "PlainAttention", "SequenceSpan"]

"""The interface of attention: packed queries against paged keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from trtqwen.executor.scheduler import Step


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence of a step: where its packed tokens lie and where its context ends.

    Attributes:
        begin, end: its rows among the packed tokens.
        context_length: tokens in its KV cache after this step.
        block_ids: its blocks, int64 [num_blocks of the sequence].
    """

    begin: int
    end: int
    context_length: int
    block_ids: Tensor

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin


class AttentionBatch:
    """A step as the model sees it: packed tokens, their positions and slots, and the span of each sequence."""

    def __init__(self, step: Step, tokens_per_block: int, device: torch.device) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logits: list[int] = []
        self.spans: list[SequenceSpan] = []
        for chunk in step.chunks:
            begin = len(tokens)
            tokens += chunk.token_ids
            span = range(chunk.start, chunk.end)
            positions += span
            slots += [chunk.block_ids[p // tokens_per_block] * tokens_per_block + p % tokens_per_block for p in span]
            blocks = torch.tensor(chunk.block_ids, device=device)
            self.spans.append(SequenceSpan(begin, len(tokens), chunk.end, blocks))
            logits += range(len(tokens) - chunk.num_logits, len(tokens))
        self.token_ids = torch.tensor(tokens, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.slots = torch.tensor(slots, device=device)
        self.logit_rows = torch.tensor(logits, dtype=torch.int64, device=device)

    @cached_property
    def context(self) -> list[SequenceSpan]:
        """Sequences with several tokens in this step."""
        return [span for span in self.spans if span.num_tokens > 1]

    @cached_property
    def generation(self) -> GenerationBatch | None:
        """Sequences with one token in this step, as one padded batch."""
        single = [span for span in self.spans if span.num_tokens == 1]
        return GenerationBatch.of(single, self.token_ids.device) if single else None


@dataclass(frozen=True)
class GenerationBatch:
    """The one-token sequences of a step.

    Attributes:
        rows: their packed rows, int64 [B].
        block_ids: their blocks, padded with block 0, int64 [B, blocks of the longest].
        lengths: their context lengths, int64 [B].
    """

    rows: Tensor
    block_ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, spans: list[SequenceSpan], device: torch.device) -> GenerationBatch:
        return cls(
            rows=torch.tensor([span.begin for span in spans], device=device),
            block_ids=torch.nn.utils.rnn.pad_sequence([span.block_ids for span in spans], batch_first=True),
            lengths=torch.tensor([span.context_length for span in spans], device=device),
        )


class AttentionBackend(Protocol):
    """Computes attention of one layer for one rank's heads."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
        """Causal attention of packed queries.

        Args:
            query: [tokens, heads, head_size].
            keys, values: the layer's cache, [blocks, kv_heads, tokens_per_block, head_size], already holding this
                step's tokens.

        Returns:
            [tokens, heads, head_size], in the dtype of `query`.
        """
        ...

"""The interface of attention: packed queries against paged keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from trtqwen.executor.inputs import StepInputs


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence of a step: the range of its packed tokens and the length of its context.

    Attributes:
        begin, end: its rows among the packed tokens.
        context_length: tokens in its KV cache after this step.
        block_ids: its blocks, int32 [num_blocks of the sequence].
    """

    begin: int
    end: int
    context_length: int
    block_ids: Tensor

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin


class AttentionBatch:
    """The model's input of a step: packed tokens, their positions and slots, and the span of each sequence.

    Args:
        sampled: the last token sampled in each slot, int64 [slots]; only for steps with placeholders.
    """

    def __init__(self, inputs: StepInputs, device: torch.device, sampled: Tensor | None = None) -> None:
        self.inputs = inputs
        data = torch.from_numpy(inputs.data).to(device)
        self.views = {name: data[place] for name, place in inputs.counts.sections.items()}
        self.token_ids = self.views["token_ids"].long()
        if inputs.has_placeholders:
            assert sampled is not None
            known = self.token_ids >= 0
            self.token_ids = torch.where(known, self.token_ids, sampled[(-1 - self.token_ids).clamp(min=0)])
        self.positions = self.views["positions"].long()
        self.slots = self.views["kv_slots"].long()
        self.logit_rows = self.views["logit_rows"].long()

    @cached_property
    def spans(self) -> list[SequenceSpan]:
        """Every sequence of the step, those with one token first."""
        inputs, blocks = self.inputs, self.views["block_ids"]
        rows, begins = inputs.query_begins.tolist(), inputs.block_begins.tolist()
        return [
            SequenceSpan(rows[index], rows[index + 1], length, blocks[begins[index] : begins[index + 1]])
            for index, length in enumerate(inputs.context_lengths.tolist())
        ]

    @cached_property
    def context(self) -> list[SequenceSpan]:
        """Sequences with several tokens in this step."""
        return self.spans[self.inputs.counts.generation :]

    @cached_property
    def generation(self) -> GenerationBatch | None:
        """Sequences with one token in this step, as one padded batch."""
        count = self.inputs.counts.generation
        return GenerationBatch.of(self.spans[:count], self.token_ids.device) if count else None


@dataclass(frozen=True)
class GenerationBatch:
    """The one-token sequences of a step, which are its first rows.

    Attributes:
        rows: their packed rows, int64 [B].
        block_ids: their blocks, padded with block 0, int32 [B, blocks of the longest].
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

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> None:
        """Store a step's keys and values in the layer's cache.

        Args:
            key, value: [tokens, kv_heads, head_size], in the cache's dtype.
            keys, values: the layer's cache, as below.
        """
        ...

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

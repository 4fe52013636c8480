"""The inputs of a step, packed into one array that is sent to the ranks and copied to the device.

All sections are int32 and contiguous, so that one copy moves a step. Each is aligned to 16 bytes, because kernels are
compiled for the alignment of their arguments. Their offsets depend only on the counts: a step that is padded to a
fixed batch size always has the same offsets, as a CUDA graph needs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trtqwen.executor.sequence import Chunk, Step

Int32: TypeAlias = npt.NDArray[np.int32]
_COUNTS = 5
_ALIGNMENT = 4  # elements
_SECTIONS = (
    "token_ids",
    "positions",
    "kv_slots",
    "query_begins",
    "context_lengths",
    "block_begins",
    "logit_rows",
    "logit_slots",
)


@dataclass(frozen=True)
class Counts:
    """Sizes of a step's sections.

    Attributes:
        tokens: packed tokens.
        sequences: sequences, those with one token first.
        generation: how many of them have one token.
        logits: rows whose logits are needed.
        blocks: KV cache blocks of all sequences together.
    """

    tokens: int
    sequences: int
    generation: int
    logits: int
    blocks: int

    @property
    def total(self) -> int:
        """Elements of all sections."""
        return sum(map(aligned, self._sizes))

    @cached_property
    def sections(self) -> dict[str, slice]:
        """Where each section lies, in elements."""
        places, begin = {}, 0
        for name, size in zip((*_SECTIONS, "block_ids"), self._sizes, strict=True):
            places[name] = slice(begin, begin + size)
            begin += aligned(size)
        return places

    @property
    def _sizes(self) -> list[int]:
        of_sequences = [self.sequences + 1, self.sequences, self.sequences + 1]
        return [self.tokens] * 3 + of_sequences + [self.logits] * 2 + [self.blocks]


class StepInputs:
    """One step.

    Attributes:
        counts: sizes of the sections.
        data: all sections, int32.
        token_ids, positions, kv_slots: of each packed token; a slot is block * tokens_per_block + offset, or -1 for
            a token that fills up a batch. Negative token ids are placeholders, see `scheduler.placeholder`.
        query_begins: the first row of each sequence, and the end of the last.
        context_lengths: tokens of each sequence in the KV cache after this step.
        block_begins: where each sequence's blocks begin in `block_ids`, and the end of the last.
        logit_rows: packed rows whose logits are needed.
        logit_slots: batch slot that each of them samples for, or -1 where the logits are only shown.
        block_ids: KV cache blocks, sequence after sequence.
    """

    token_ids: Int32
    positions: Int32
    kv_slots: Int32
    query_begins: Int32
    context_lengths: Int32
    block_begins: Int32
    logit_rows: Int32
    logit_slots: Int32
    block_ids: Int32

    def __init__(self, counts: Counts, data: Int32) -> None:
        self.counts = counts
        self.data = data
        for name, place in counts.sections.items():
            setattr(self, name, data[place])

    def to_bytes(self) -> bytes:
        """Serialize the step for another rank."""
        counts = self.counts
        head = (counts.tokens, counts.sequences, counts.generation, counts.logits, counts.blocks)
        return np.array(head, np.int32).tobytes() + self.data.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> StepInputs:
        """Read a step that `to_bytes` wrote."""
        data = np.frombuffer(content, np.int32)
        return cls(Counts(*data[:_COUNTS].tolist()), data[_COUNTS:])

    @cached_property
    def has_placeholders(self) -> bool:
        """Return whether only the device knows some token ids."""
        return bool((self.token_ids < 0).any())


def pack(step: Step, tokens_per_block: int) -> StepInputs:
    """Lay a step out, in the order of its chunks."""
    chunks = step.chunks
    tokens = array("i")
    blocks = array("i")
    generation = sum(len(chunk.token_ids) == 1 for chunk in chunks)
    for chunk in chunks:
        tokens.extend(chunk.token_ids)
        blocks.extend(chunk.block_ids)
    rows = _logit_rows(chunks)
    counts = Counts(len(tokens), len(chunks), generation, len(rows), len(blocks))
    inputs = StepInputs(counts, np.zeros(counts.total, np.int32))
    inputs.token_ids[:] = tokens
    inputs.block_ids[:] = blocks
    lengths = np.array([len(chunk.token_ids) for chunk in chunks], np.int32)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    inputs.query_begins[0] = inputs.block_begins[0] = 0
    np.cumsum(lengths, out=inputs.query_begins[1:])
    np.add(starts, lengths, out=inputs.context_lengths)
    np.cumsum([len(chunk.block_ids) for chunk in chunks], out=inputs.block_begins[1:])
    owner = np.repeat(np.arange(len(chunks)), lengths)
    inputs.positions[:] = np.arange(counts.tokens) - inputs.query_begins[owner] + starts[owner]
    block, offset = np.divmod(inputs.positions, tokens_per_block)
    inputs.kv_slots[:] = inputs.block_ids[inputs.block_begins[owner] + block] * tokens_per_block + offset
    inputs.logit_rows[:] = rows
    inputs.logit_slots[:] = _logit_slots(chunks)
    return inputs


def _logit_rows(chunks: Sequence[Chunk]) -> list[int]:
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.token_ids)
        rows += range(end - chunk.num_logits, end)
    return rows


def _logit_slots(chunks: Sequence[Chunk]) -> list[int]:
    slots: list[int] = []
    for chunk in chunks:
        slots += [-1] * (chunk.num_logits - chunk.samples)
        if chunk.samples:
            slots.append(chunk.sequence.slot)
    return slots


def aligned(size: int) -> int:
    """Elements of a section with what fills it up."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT

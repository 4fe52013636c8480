"""Changes of logits that requests ask for before a token is chosen, for all rows of a step at once.

Biases and bad words are changes of single logits, which the host lists for each step. Penalties read the tokens that
a sequence has seen, which stay on the device: Qwen's own defaults have a repetition penalty, so most steps have some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trtqwen.executor.sequence import SequenceState

Numbers: TypeAlias = npt.NDArray[Any]
Penalize: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LARGEST = torch.finfo(torch.float32).max
_NEVER = float("-inf")
_NONE = (1.0, 0.0, 0.0)
_IN_PROMPT, _IN_ANSWER = 1, 2  # what a token adds to its entry of the table


def adjustments(sequences: Sequence[SequenceState], vocab_size: int) -> list[tuple[int, int, float]]:
    """(row, token id, what is added to its logit) for biases, bad words and ends that come too early."""
    changes: list[tuple[int, int, float]] = []
    for row, sequence in enumerate(sequences):
        request = sequence.request
        changes += [(row, token_id, value) for token_id, value in request.embedding_bias.items()]
        for *before, last in request.bad_words:
            if not before or sequence.token_ids[-len(before) :] == before:
                changes.append((row, last, _NEVER))
        end_id = request.end_id
        early = sequence.next_output < request.sampling.min_tokens
        if end_id is not None and 0 <= end_id < vocab_size and early:
            changes.append((row, end_id, _NEVER))
    return changes


def has_adjustments(sequence: SequenceState) -> bool:
    """Whether `adjustments` may have something for a sequence, now or later."""
    request = sequence.request
    ends_early = request.sampling.min_tokens > 0 and request.end_id is not None
    return bool(request.embedding_bias or request.bad_words or ends_early)


def penalties(sequence: SequenceState) -> tuple[float, float, float]:
    """Repetition, presence and frequency penalty of a sequence."""
    sampling = sequence.request.sampling
    return sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty


def penalize(logits: Tensor, table: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """Logits with their penalties, in plain PyTorch.

    A repetition penalty divides the positive logits of tokens in prompt or answer and multiplies the negative ones.
    The others are subtracted for tokens of the answer, as in TensorRT-LLM. An overflow becomes the largest float32.

    Args:
        logits: float [rows, vocab_size]; float32 ones are changed in place.
        table: see `PenaltyTables`.
        slots: int64 [rows].
        values: float32 [3, rows]: repetition, presence and frequency penalty.

    Returns:
        float32 [rows, vocab_size].
    """
    logits = logits.float()
    none = torch.tensor(_NONE, device=values.device)[:, None]
    rows = (values != none).any(dim=0).nonzero()[:, 0]
    repetition, presence, frequency = values[:, rows, None]
    before, seen = logits[rows], table[slots[rows]]
    repeated = torch.where(before > 0, before / repetition, before * repetition)
    after = torch.where(seen > 0, repeated, before)
    counts = seen // _IN_ANSWER
    after = after - torch.where(counts > 0, presence + frequency * counts, 0.0)
    logits[rows] = torch.where((after > LARGEST) & (before <= LARGEST), LARGEST, after)
    return logits


@dataclass(frozen=True)
class Rows:
    """The sequences that a step samples for, one for each row of its logits.

    Attributes:
        slots: their batch slots, int64 [rows], on the host.
        places: the same on the device.
    """

    sequences: Sequence[SequenceState]
    slots: Numbers
    places: Tensor


class PenaltyTables:
    """Which tokens each batch slot has seen, on the device: a step in flight adds its own without the host.

    The table is int32 [slots, vocab_size]: twice how often a token stands in the answer, plus one if it stands in the
    prompt. A slot's row counts only for a sequence that has penalties.

    Args:
        penalize: computes; `penalties.penalize` where the device has no kernel of its own.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device, penalize: Penalize) -> None:
        self._penalize = penalize
        self._owners: list[SequenceState | None] = [None] * slots
        self._lengths = [0] * slots
        self._device = device
        self._values = np.tile(np.array(_NONE, np.float32)[:, None], slots)
        self._table = torch.zeros((slots, vocab_size), dtype=torch.int32, device=device)

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        """The logits with the penalties of their sequences, float32.

        Args:
            logits: float [rows, vocab_size]; float32 ones may be changed in place.
        """
        for sequence in rows.sequences:
            self._load(sequence)
        values = to_device(self._values[:, rows.slots], self._device)
        return self._penalize(logits, self._table, rows.places, values)

    def add(self, tokens: Tensor, rows: Rows) -> None:
        """Note the tokens that were chosen for the rows of the last `apply`; those below 0 are none.

        Args:
            tokens: int64 [rows].
        """
        flat = self._table.view(-1)
        flat[rows.places * self._table.shape[1] + tokens.clamp(min=0)] += _IN_ANSWER * (tokens >= 0)
        for slot in rows.slots:
            self._lengths[slot] += 1

    def _load(self, sequence: SequenceState) -> None:
        """Write the tokens of a sequence, up to the one that is chosen now, to the table."""
        slot, prompt = sequence.slot, sequence.num_prompt
        length = prompt + sequence.next_output
        if self._owners[slot] is sequence and self._lengths[slot] == length:
            return
        self._owners[slot], self._lengths[slot] = sequence, length
        self._values[:, slot] = np.clip(penalties(sequence), -LARGEST, LARGEST)
        if not has_penalties(sequence):
            return
        assert length <= len(sequence.token_ids), "a pending token is not in the tables"
        tokens = to_device(np.array(sequence.token_ids[:length], np.int64), self._device)
        row = self._table[slot].zero_()
        row.index_fill_(0, tokens[:prompt], _IN_PROMPT)  # `row[...] = 1` makes the host wait for the device
        answer = tokens[prompt:]
        row.index_put_((answer,), torch.full_like(answer, _IN_ANSWER, dtype=torch.int32), accumulate=True)


def has_penalties(sequence: SequenceState) -> bool:
    """Whether the tokens of a sequence change the odds of later ones."""
    return penalties(sequence) != _NONE


def to_device(values: Numbers, device: torch.device) -> Tensor:
    """A copy on the device. On CUDA the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))  # kernels index it
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

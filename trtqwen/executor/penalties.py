"""What requests ask to change in their logits before a token is chosen, for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtqwen.executor.sequence import SequenceState

_NEVER = float("-inf")


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


def has_penalties(sequence: SequenceState) -> bool:
    """Whether the tokens of a sequence change the odds of later ones."""
    sampling = sequence.request.sampling
    return sampling.repetition_penalty != 1.0 or bool(sampling.presence_penalty or sampling.frequency_penalty)


class PenaltyTables:
    """Which tokens each batch slot has seen, on the device: a step in flight adds its own without the host.

    Attributes are made with the first request that has penalties: `counts` int16 [slots, vocab_size], of the answer's
    tokens, and `seen` bool, of those in prompt or answer.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._known: dict[int, tuple[SequenceState, int]] = {}
        self._device = device
        self._counts = torch.zeros((slots, vocab_size), dtype=torch.int16, device=device)
        self._seen = torch.zeros((slots, vocab_size), dtype=torch.bool, device=device)

    def apply(self, logits: Tensor, rows: Sequence[int], sequences: Sequence[SequenceState]) -> None:
        """Change rows of `logits` in place: repetition, presence and frequency penalties.

        Args:
            sequences: whose rows these are, one for each of `rows`.
        """
        for sequence in sequences:
            self._load(sequence)
        place = torch.tensor(rows, device=self._device)
        slots = torch.tensor([sequence.slot for sequence in sequences], device=self._device)
        samplings = [sequence.request.sampling for sequence in sequences]
        penalties = [(s.repetition_penalty, s.presence_penalty, s.frequency_penalty) for s in samplings]
        repetition, presence, frequency = torch.tensor(penalties, device=self._device).T[:, :, None]
        values, counts = logits[place], self._counts[slots]
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(self._seen[slots], repeated, values)
        # Zero counts stay zero under an infinite penalty.
        charge = torch.where(counts > 0, presence + frequency * counts, 0.0)
        logits[place] = values - charge

    def add(self, tokens: Tensor, rows: Sequence[int], sequences: Sequence[SequenceState]) -> None:
        """Note the tokens that were chosen; those below 0 are none.

        Args:
            tokens: int64 [all rows].
        """
        place = torch.tensor(rows, device=self._device)
        slots = torch.tensor([sequence.slot for sequence in sequences], device=self._device)
        chosen = tokens[place]
        one = (chosen >= 0).to(torch.int16)
        chosen = chosen.clamp(min=0)
        self._counts.index_put_((slots, chosen), one, accumulate=True)
        self._seen[slots, chosen] |= one > 0
        for sequence in sequences:
            self._known[sequence.slot] = (sequence, self._known[sequence.slot][1] + 1)

    def _load(self, sequence: SequenceState) -> None:
        """Have the tables hold what a sequence's tokens are before the one that is chosen now."""
        prompt = len(sequence.request.input_token_ids)
        length = prompt + sequence.next_output
        if self._known.get(sequence.slot) == (sequence, length):
            return
        assert length <= len(sequence.token_ids), "a pending token is not in the tables"
        tokens = torch.tensor(sequence.token_ids[:length], device=self._device)
        counts, seen = self._counts[sequence.slot], self._seen[sequence.slot]
        counts.zero_()
        seen.zero_()
        seen[tokens] = True
        answer = tokens[prompt:]
        counts.index_put_((answer,), torch.ones_like(answer, dtype=torch.int16), accumulate=True)
        self._known[sequence.slot] = (sequence, length)

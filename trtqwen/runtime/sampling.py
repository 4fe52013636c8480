"""Choosing the next token of each sequence from its logits, with TensorRT-LLM's parameters and order of steps."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

import torch
from torch import Tensor

from trtqwen.runtime.scheduler import Sequence


class Sampler:
    """Keeps one random number generator for each sampling request, so that its answer depends on its seed alone."""

    def __init__(self) -> None:
        self._generators: dict[str, torch.Generator] = {}

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Ordered[Sequence]) -> list[int | None]:
        """One token for each row; None where the logits are not finite.

        Args:
            logits: float32 [rows, vocab_size]; changed in place.
            sequences: whose rows these are.
        """
        finite = logits.isfinite().all(dim=-1).tolist()
        for row, sequence in zip(logits, sequences, strict=True):
            _penalise(row, sequence)
        tokens: list[int | None] = [int(token) for token in logits.argmax(dim=-1).tolist()]
        for index, sequence in enumerate(sequences):
            if not finite[index]:
                tokens[index] = None
            elif not sequence.request.sampling.greedy:
                tokens[index] = self._draw(logits[index], sequence)
        return tokens

    def forget(self, request_id: str) -> None:
        """Drop the random state of a request that ended."""
        self._generators.pop(request_id, None)

    def _draw(self, row: Tensor, sequence: Sequence) -> int:
        sampling = sequence.request.sampling
        generator = self._generators.get(sequence.request.id)
        if generator is None:
            generator = torch.Generator(row.device)
            generator.manual_seed(sampling.seed)
            self._generators[sequence.request.id] = generator
        count = min(sampling.top_k or len(row), len(row))
        values, token_ids = torch.topk(row / sampling.temperature, count)
        probabilities = values.softmax(dim=-1)
        if 0 < sampling.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities[before >= sampling.top_p] = 0.0
        choice = torch.multinomial(probabilities, 1, generator=generator)
        return int(token_ids[choice])


def _penalise(row: Tensor, sequence: Sequence) -> None:
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_output:
        counts = torch.bincount(torch.tensor(sequence.output, device=row.device), minlength=len(row))
        row -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
    end_id = sequence.request.end_id
    if end_id is not None and 0 <= end_id < len(row) and sequence.num_output < sampling.min_tokens:
        row[end_id] = float("-inf")

"""Choosing the next token of each sequence from its logits, with TensorRT-LLM's parameters and order of steps."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trtqwen.diagnostics import RequestError
from trtqwen.executor.scheduler import Sequence

_COLDEST = 1e-20


class Guide(Protocol):
    """Keeps an answer in a form, token by token."""

    def mask(self, row: Tensor) -> None:
        """Forbid, in place, what must not come next.

        Args:
            row: float32 [vocab_size].

        Raises:
            RequestError: if the guide fails.
        """

    def accept(self, token_id: int) -> None:
        """Take in the token that came next."""


@dataclass(frozen=True)
class Sampled:
    """A chosen token.

    Attributes:
        log_prob: its log probability by the model itself, if the request wants it.
        logits: what the model said, float32 [vocab_size], if the request wants it.
    """

    token_id: int
    log_prob: float | None = None
    logits: Tensor | None = None


@dataclass
class _Memory:
    """What is kept for a request between its tokens."""

    guide: Guide | None = None
    generator: torch.Generator | None = None
    bias: Tensor | None = None


class Sampler:
    """Keeps one random number generator for each sampling request, so that its answer depends on its seed alone."""

    def __init__(self) -> None:
        self._memory: dict[str, _Memory] = {}

    def guide(self, request_id: str, guide: Guide) -> None:
        """Have a guide decide about a request's tokens, from the first one on."""
        self._of(request_id).guide = guide

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Ordered[Sequence]) -> list[Sampled | RequestError]:
        """One token for each row, or why there is none.

        Args:
            logits: float32 [rows, vocab_size]; changed in place.
            sequences: whose rows these are.
        """
        finite = logits.isfinite().all(dim=-1).tolist()
        wanted = {index: row.clone() for index, row in enumerate(logits) if _wants_logits(sequences[index])}
        refused: dict[int, RequestError] = {}
        for index, (row, sequence) in enumerate(zip(logits, sequences, strict=True)):
            try:
                self._change(row, sequence)
            except RequestError as problem:
                refused[index] = problem
        best, likeliest = logits.max(dim=-1)
        possible, tokens = best.isfinite().tolist(), likeliest.tolist()
        results: list[Sampled | RequestError] = []
        for index, sequence in enumerate(sequences):
            if not finite[index]:
                results.append(RequestError("the logits are not finite", "convert the model to bfloat16"))
            elif index in refused:
                results.append(refused[index])
            elif not possible[index]:
                results.append(RequestError("no token is left to choose", "ask with fewer or smaller restrictions"))
            else:
                greedy = sequence.request.sampling.greedy
                token_id = tokens[index] if greedy else self._draw(logits[index], sequence)
                results.append(_sampled(token_id, sequence, wanted.get(index)))
        for sequence, result in zip(sequences, results, strict=True):
            self._accept(sequence, result)
        return results

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended."""
        self._memory.pop(request_id, None)

    def _of(self, request_id: str) -> _Memory:
        return self._memory.setdefault(request_id, _Memory())

    def _change(self, row: Tensor, sequence: Sequence) -> None:
        """Apply to a row what the request asks for, but for temperature and the choice itself."""
        request = sequence.request
        if request.embedding_bias:
            memory = self._of(request.id)
            if memory.bias is None:
                memory.bias = torch.zeros_like(row)
                memory.bias[list(request.embedding_bias)] = torch.tensor(list(request.embedding_bias.values()))
            row += memory.bias
        _penalise(row, sequence)
        for *before, last in request.bad_words:
            if not before or sequence.token_ids[-len(before) :] == before:
                row[last] = float("-inf")
        if request.guided_decoding is not None:
            guide = self._memory[request.id].guide
            assert guide is not None
            guide.mask(row)

    def _accept(self, sequence: Sequence, result: Sampled | RequestError) -> None:
        if sequence.request.guided_decoding is not None and isinstance(result, Sampled):
            guide = self._memory[sequence.request.id].guide
            assert guide is not None
            guide.accept(result.token_id)

    def _draw(self, row: Tensor, sequence: Sequence) -> int:
        sampling = sequence.request.sampling
        memory = self._of(sequence.request.id)
        if memory.generator is None:
            memory.generator = torch.Generator(row.device)
            memory.generator.manual_seed(sampling.seed)
        count = min(sampling.top_k or len(row), len(row))
        # Relative to the largest one and bounded, so that no temperature is too small for float32.
        values, token_ids = torch.topk((row - row.max()) / max(sampling.temperature, _COLDEST), count)
        probabilities = values.softmax(dim=-1)
        if 0 < sampling.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities[before >= sampling.top_p] = 0.0
        choice = torch.multinomial(probabilities, 1, generator=memory.generator)
        return int(token_ids[choice])


def _wants_logits(sequence: Sequence) -> bool:
    output = sequence.request.output
    return output.return_log_probs or output.return_generation_logits


def _sampled(token_id: int, sequence: Sequence, logits: Tensor | None) -> Sampled:
    if logits is None:
        return Sampled(token_id)
    output = sequence.request.output
    log_prob = float(logits[token_id] - logits.logsumexp(dim=-1)) if output.return_log_probs else None
    return Sampled(token_id, log_prob, logits if output.return_generation_logits else None)


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

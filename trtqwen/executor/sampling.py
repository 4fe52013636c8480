"""Sampling of each sequence's next token from its logits, with TensorRT-LLM's parameters and order of operations.

One module for CPU and CUDA. `launch` queues all work on the device without a wait. `Pending.results` waits for the
tokens, which on CUDA arrive one step late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trtqwen.diagnostics import RequestError
from trtqwen.executor.choose import NONE_LEFT, NOT_FINITE, Choice, choose, uniforms
from trtqwen.executor.log_probs import Likeliest, likeliest
from trtqwen.executor.penalties import (
    Penalize,
    PenaltyTables,
    Rows,
    adjustments,
    has_adjustments,
    has_penalties,
    penalize,
    to_device,
)
from trtqwen.executor.request import Request, SamplingConfig
from trtqwen.executor.sequence import SequenceState

Choose = Callable[[Tensor, Choice], Tensor]


class Guide(Protocol):
    """A guide of an answer, token by token."""

    def mask(self, row: Tensor) -> None:
        """Forbid, in place, what must not come next.

        Args:
            row: float32 [vocab_size].

        Raises:
            RequestError: if the guide fails.
        """

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""


@dataclass(frozen=True)
class Sampled:
    """A chosen token.

    Attributes:
        log_prob: its log probability by the model itself, if the request wants it.
        logits: what the model said, float32 [vocab_size], if the request wants it.
        top: the most likely tokens in its place, if the request wants them.
    """

    token_id: int
    log_prob: float | None = None
    logits: Tensor | None = None
    top: Likeliest | None = None


class Pending:
    """Tokens that are copied from the device to the host.

    Attributes:
        tokens: int64 [rows], on the device.
        plain: whether the rows ask for nothing but tokens.
    """

    def __init__(
        self,
        tokens: Tensor,
        log_probs: Tensor | None,
        own: dict[int, Tensor],
        refused: dict[int, RequestError],
        finish: Callable[[list[Sampled | RequestError]], None],
    ) -> None:
        self.tokens = tokens
        self.plain = finish is _nothing
        self._own, self._refused, self._finish = own, refused, finish
        self._log_probs = None if log_probs is None else log_probs.to("cpu", non_blocking=True)
        self._on_host = tokens.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def token_ids(self) -> list[int]:
        """Wait for the tokens: an id for each row, or `NOT_FINITE`, or `NONE_LEFT`."""
        if self._arrived is not None:
            self._arrived.synchronize()
        token_ids: list[int] = self._on_host.tolist()
        return token_ids

    def results(self) -> list[Sampled | RequestError]:
        """Wait for the tokens: one for each row, or why there is none."""
        token_ids = self.token_ids()
        log_probs = None if self._log_probs is None else self._log_probs.tolist()
        results: list[Sampled | RequestError] = []
        for row, token_id in enumerate(token_ids):
            if token_id == NOT_FINITE:
                results.append(RequestError("the logits are not finite", "convert the model to bfloat16"))
            elif row in self._refused:
                results.append(self._refused[row])
            elif token_id == NONE_LEFT:
                results.append(
                    RequestError(
                        "no token is left to choose", "send fewer bad words and biases, or a less strict guide"
                    )
                )
            else:
                log_prob = log_probs[row] if log_probs is not None and row in self._own else None
                results.append(Sampled(token_id, log_prob, self._own.get(row)))
        self._finish(results)
        return results


class Sampler:
    """Chooses tokens for the sequences of a batch.

    Args:
        slots: batch slots, `max_batch_size`.
        chooser: chooses from logits; `choose.choose` where the device has no kernel of its own.
        penalizer: changes logits; `penalties.penalize` where the device has none.

    Attributes:
        last_tokens: the token sampled last in each slot, int64 [slots + 1] on the device; the last entry is for rows
            that belong to no slot.
    """

    def __init__(
        self, slots: int, device: torch.device, chooser: Choose = choose, penalizer: Penalize = penalize
    ) -> None:
        self._slots = slots
        self._device = device
        self._chooser = chooser
        self._penalizer = penalizer
        self._guides: dict[str, Guide] = {}
        self._owners: list[SequenceState | None] = [None] * slots
        self._values = np.zeros((5, slots), np.float32)  # rows as in `Choice.values`
        self._seeds = np.zeros(slots, np.uint64)
        self._special = np.zeros(slots, np.bool_)  # needs the host in each step
        self._penalized = np.zeros(slots, np.bool_)
        self._tables: PenaltyTables | None = None
        self.last_tokens = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    def guide(self, request_id: str, guide: Guide) -> None:
        """Set the guide of a request, from its first token on."""
        self._guides[request_id] = guide

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._guides.pop(request_id, None)

    def make_tables(self, vocab_size: int) -> PenaltyTables:
        """The tables of penalties. They are made once; a start makes them before it divides the memory."""
        if self._tables is None:
            self._tables = PenaltyTables(self._slots, vocab_size, self._device, self._penalizer)
        return self._tables

    def warm_up(self, logits: Tensor) -> None:
        """Choose in every way, so that no request waits for a kernel to be compiled or loaded.

        Args:
            logits: float [1, vocab_size], in the dtype of the computation.
        """
        drawn = {"temperature": 0.7, "top_p": 1.0}
        penalties = {"repetition_penalty": 1.05, "presence_penalty": 0.1, "frequency_penalty": 0.1}
        for changes in ({}, drawn, drawn | {"top_k": 20, "top_p": 0.8}, penalties, penalties | drawn):
            sampling = SamplingConfig.model_validate(changes)
            request = Request(id="warm-up", input_token_ids=(0, 0), max_tokens=3, sampling=sampling)
            sequence = SequenceState(request, request.max_tokens, [0, 0, 0], slot=0)
            for values in (logits, logits.float()):
                self.launch(values, [sequence]).token_ids()

    def sample(self, logits: Tensor, sequences: Sequence[SequenceState]) -> list[Sampled | RequestError]:
        """One token for each row, or why there is none; see `launch`."""
        return self.launch(logits, sequences).results()

    @torch.inference_mode()
    def launch(self, logits: Tensor, sequences: Sequence[SequenceState]) -> Pending:
        """Queue the choice of one token for each row.

        Args:
            logits: float [rows, vocab_size]; float32 ones are changed in place.
            sequences: whose rows these are.
        """
        for sequence in sequences:
            if self._owners[sequence.slot] is not sequence:
                self._admit(sequence)
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        values = self._values[:, slots]
        indices = np.array([sequence.next_output for sequence in sequences], np.uint64)
        values[3] = uniforms(self._seeds[slots], indices)
        drawn = values[0] > 0
        filters = bool((drawn & ((values[1] > 0) & (values[1] < 1) | (values[2] > 0) | (values[4] > 0))).any())
        choice = Choice(to_device(values, self._device), bool(drawn.any()), filters)
        rows = Rows(sequences, slots, to_device(slots, self._device))
        if self._special[slots].any():
            return self._special_launch(logits.float(), rows, choice)
        tokens = self._chooser(self._penalize(logits, rows), choice)
        self._note(tokens, rows)
        return Pending(tokens, None, {}, {}, _nothing)

    def _special_launch(self, logits: Tensor, rows: Rows, choice: Choice) -> Pending:
        """Sample with biases, bad words, guides and log probabilities, which the host prepares."""
        sequences = rows.sequences
        unusable = ~logits.amax(dim=-1).isfinite()
        wanting = [row for row, sequence in enumerate(sequences) if _wants_logits(sequence)]
        own = {row: logits[row].clone() for row in wanting}
        totals = logits.logsumexp(dim=-1) if wanting else None
        self._adjust(logits, sequences)
        logits = self._penalize(logits, rows)
        refused = self._mask(logits, sequences)
        # A bias can overflow; such a row has nothing left either.
        overflown = logits.amax(dim=-1, keepdim=True).isfinite().logical_not()
        tokens = self._chooser(logits.masked_fill(overflown, float("-inf")), choice)
        tokens = tokens.masked_fill(unusable, NOT_FINITE)
        self._note(tokens, rows)
        log_probs = None
        if totals is not None:
            chosen = torch.stack([own[row] for row in wanting]).gather(1, tokens[wanting].clamp(min=0)[:, None])[:, 0]
            log_probs = torch.zeros(len(sequences), device=self._device)
            log_probs[wanting] = chosen - totals[wanting]

        def finish(results: list[Sampled | RequestError]) -> None:
            for row, (sequence, result) in enumerate(zip(sequences, results, strict=True)):
                if isinstance(result, Sampled):
                    results[row] = _asked_for(sequence, result)
                    if sequence.request.guided_decoding is not None and sequence.request.id in self._guides:
                        self._guides[sequence.request.id].accept(result.token_id)

        return Pending(tokens, log_probs, own, refused, finish)

    def _admit(self, sequence: SequenceState) -> None:
        sampling, slot = sequence.request.sampling, sequence.slot
        self._owners[slot] = sequence
        temperature = 0.0 if sampling.greedy else sampling.temperature
        self._values[:, slot] = (temperature, sampling.top_p, sampling.min_p, 0.0, min(sampling.top_k, 1 << 24))
        if temperature and not self._values[0, slot]:
            self._values[0, slot] = np.finfo(np.float32).tiny  # drawn, however cold: float32 lost it
        self._seeds[slot] = sampling.seed
        self._penalized[slot] = has_penalties(sequence)
        self._special[slot] = (
            has_adjustments(sequence) or _wants_logits(sequence) or sequence.request.guided_decoding is not None
        )

    def _adjust(self, logits: Tensor, sequences: Sequence[SequenceState]) -> None:
        changes = adjustments(sequences, logits.shape[1])
        if changes:
            rows, tokens, values = zip(*changes, strict=True)
            place = torch.tensor([rows, tokens], device=self._device)
            amounts = torch.tensor(values, dtype=torch.float32, device=self._device)
            logits.index_put_((place[0], place[1]), amounts, accumulate=True)

    def _mask(self, logits: Tensor, sequences: Sequence[SequenceState]) -> dict[int, RequestError]:
        refused: dict[int, RequestError] = {}
        for row, sequence in enumerate(sequences):
            if sequence.request.guided_decoding is not None:
                try:
                    self._guides[sequence.request.id].mask(logits[row])
                except RequestError as problem:
                    refused[row] = problem
        return refused

    def _penalize(self, logits: Tensor, rows: Rows) -> Tensor:
        if not self._penalized[rows.slots].any():
            return logits
        return self.make_tables(logits.shape[1]).apply(logits, rows)

    def _note(self, tokens: Tensor, rows: Rows) -> None:
        """Keep the chosen tokens on the device, for the next step and for the penalties."""
        self.last_tokens[rows.places] = tokens.clamp(min=0)
        if self._tables is not None and self._penalized[rows.slots].any():
            self._tables.add(tokens, rows)


def _nothing(results: list[Sampled | RequestError]) -> None:
    """Return the empty extras of rows that ask only for tokens."""


def _asked_for(sequence: SequenceState, sampled: Sampled) -> Sampled:
    output = sequence.request.output
    count = output.num_top_log_probs if output.return_log_probs else 0
    return Sampled(
        sampled.token_id,
        sampled.log_prob if output.return_log_probs else None,
        sampled.logits if output.return_generation_logits else None,
        None if sampled.logits is None or not count else likeliest(sampled.logits[None], count),
    )


def _wants_logits(sequence: SequenceState) -> bool:
    output = sequence.request.output
    return output.return_log_probs or output.return_generation_logits

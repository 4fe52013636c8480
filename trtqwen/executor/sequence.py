"""A request in the scheduler, its chunk of a step, and the step's result."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from trtqwen.executor.request import FinishReason, Request, Response


class Chunk(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        sequence: whose tokens these are.
        token_ids: the tokens to compute; a negative one is a placeholder, see `placeholder`.
        start: position of the first of them.
        block_ids: the sequence's KV cache blocks, in order of position; the sequence's own, which later steps extend.
        samples: whether the last token is the last known one, so that the step gives a new token.
        num_logits: how many of the last tokens' logits are needed: all of them where the request wants to see them.
    """

    sequence: SequenceState
    token_ids: tuple[int, ...]
    start: int
    block_ids: array[int]
    samples: bool
    num_logits: int

    @property
    def request_id(self) -> str:
        return self.sequence.request.id

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class Step:
    """The next step of every rank, in the order of the packed tokens. Sequences with one token come first."""

    chunks: tuple[Chunk, ...]


class Generated(NamedTuple):
    """The result of a step for a sequence.

    Attributes:
        token_id: its new token; None for an end id, which is not part of the answer.
        finish_reason: why the answer ends with it.
    """

    sequence: SequenceState
    token_id: int | None
    finish_reason: FinishReason | None

    @property
    def request_id(self) -> str:
        return self.sequence.request.id

    def response(self) -> Response:
        """Return the response for the client."""
        token_ids = () if self.token_id is None else (self.token_id,)
        return Response(request_id=self.request_id, token_ids=token_ids, finish_reason=self.finish_reason)


def placeholder(slot: int) -> int:
    """The token id that stands for the last token sampled in a slot, whose value only the device knows so far."""
    return -1 - slot


@dataclass(eq=False)
class SequenceState:
    """The state of a request: the known tokens, and how many of them are computed.

    Attributes:
        num_computed: tokens whose keys and values are computed, or are being computed by a step in flight.
        num_pending: tokens that steps in flight sample; `token_ids` gets them in `Scheduler.update`.
        ended: whether it has ended; a step in flight may still contain it.
        slot: its place in the batch while it runs, below `max_batch_size`; -1 while it waits.
        block_keys: keys of the full blocks, as far as they were needed.
        num_published: how many of its blocks others can find.
        num_reused: how many blocks it found computed already, pauses included.
    """

    request: Request
    max_tokens: int
    token_ids: list[int]
    num_computed: int = 0
    num_pending: int = 0
    slot: int = -1
    ended: bool = False
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    block_keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_reused: int = 0

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def ends_with(self, word: tuple[int, ...]) -> bool:
        """Whether the answer's last tokens are `word`."""
        return len(word) <= self.num_output and tuple(self.token_ids[-len(word) :]) == word

    @property
    def paused(self) -> bool:
        """Return whether it has started but lost its blocks."""
        return self.num_output > 0 and not self.block_ids

    @property
    def num_missing(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def in_generation(self) -> bool:
        return self.num_missing == 1 and self.num_output + self.num_pending > 0

    @property
    def complete(self) -> bool:
        """Return whether its last token is known, or sampled by a step in flight."""
        return self.num_output + self.num_pending >= self.max_tokens

    @property
    def next_output(self) -> int:
        """Index in the answer of the token that is sampled next or, while a step is in flight, last."""
        return self.num_output + max(self.num_pending, 1) - 1

    @cached_property
    def num_prompt(self) -> int:
        return len(self.request.input_token_ids)

    @cached_property
    def needs_host(self) -> bool:
        """Whether its next token cannot be chosen before the host knows the one before."""
        request = self.request
        return request.guided_decoding is not None or any(len(word) > 1 for word in request.bad_words)

    @property
    def final_tokens(self) -> int:
        """Tokens in the KV cache when the answer is complete; the last token is never fed back."""
        return len(self.request.input_token_ids) + self.max_tokens - 1

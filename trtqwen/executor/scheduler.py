"""Decides each step of in-flight batching. Pure Python: no tensors, no clock, no I/O.

One idea: a sequence has tokens it knows (prompt and answer so far) and tokens whose keys and values are computed. A
step computes some of the missing ones of many sequences at once. Where it computes a sequence's last known token,
the model's output gives one token more. While only that one is missing a sequence is in its generation phase, before
that in its context phase; a paused sequence has nothing computed and is in its context phase again.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from trtqwen.diagnostics import RequestError
from trtqwen.executor.kv_cache import BlockPool, block_key, salt_key
from trtqwen.executor.request import FinishReason, IterationStats, Request, Response

SchedulerPolicy = Literal["guaranteed_no_evict", "max_utilization"]

# Logits that one request may ask for: they cross two processes and a gRPC message, whose limit is 2 GiB.
MOST_LOGITS_BYTES = 1 << 28


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step, by TensorRT-LLM's names; see `recipe.EngineRecipe` and `recipe.ServeRecipe`."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int
    num_blocks: int
    vocab_size: int
    batch_scheduler_policy: SchedulerPolicy = "guaranteed_no_evict"
    enable_chunked_context: bool = True
    enable_kv_cache_reuse: bool = False
    max_queue_size: int = 0


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

    sequence: Sequence
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
    """What every rank computes next, in the order of the packed tokens: sequences with one token come first."""

    chunks: tuple[Chunk, ...]


class Generated(NamedTuple):
    """What a step gave a sequence.

    Attributes:
        token_id: its new token; None for an end id, which is not part of the answer.
        finish_reason: why the answer ends with it.
    """

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None

    @property
    def request_id(self) -> str:
        return self.sequence.request.id

    def response(self) -> Response:
        """The same as a client's response."""
        token_ids = () if self.token_id is None else (self.token_id,)
        return Response(request_id=self.request_id, token_ids=token_ids, finish_reason=self.finish_reason)


def placeholder(slot: int) -> int:
    """The token id that stands for the last token sampled in a slot, whose value only the device knows so far."""
    return -1 - slot


@dataclass(eq=False)
class Sequence:
    """A request on its way: the tokens known so far and how many of them are computed.

    Attributes:
        num_computed: tokens whose keys and values are computed, or are being computed by a step in flight.
        num_pending: tokens that steps in flight sample; `token_ids` gets them in `Scheduler.update`.
        ended: whether it has left; a step in flight may still hold it.
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
        """Whether it has begun, but lost its blocks."""
        return self.num_output > 0 and not self.block_ids

    @property
    def num_missing(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def in_generation(self) -> bool:
        return self.num_missing == 1 and self.num_output + self.num_pending > 0

    @property
    def complete(self) -> bool:
        """Whether its last token is known, or on its way."""
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


class Scheduler:
    """Requests wait in order of arrival, run in a shared batch, and leave when they end.

    Under `guaranteed_no_evict` a request joins when the blocks of its whole answer, and those of everyone before
    it, fit into the pool: no request is ever paused. Under `max_utilization` it joins when the next chunk fits; when
    blocks run out the youngest are paused, so the oldest always moves on.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.tokens_per_block)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(reversed(range(config.max_batch_size)))
        self._stats = IterationStats()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def __getitem__(self, request_id: str) -> Sequence:
        return self._sequences[request_id]

    @property
    def idle(self) -> bool:
        return not self._sequences

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: if it can never be served under these limits, or the queue is full.
        """
        sequence = self._admissible(request)
        limit = self.config.max_queue_size
        if limit and len(self._waiting) >= limit:  # the text upstream's clients look for
            raise RequestError(f"Maximum queue size of {limit} has been reached, please try again later")
        self._sequences[request.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> Response | None:
        """End a request at once, wherever it is; None if it is not in flight (any more)."""
        if request_id not in self._sequences:
            return None
        self._leave(self._sequences[request_id])
        return Response(request_id=request_id, finish_reason=FinishReason.CANCELLED)

    def fail(self, request_id: str, error: str) -> Response:
        """End a request with an error."""
        self._leave(self._sequences[request_id])
        return Response(request_id=request_id, finish_reason=FinishReason.ERROR, error=error)

    def fail_all(self, error: str) -> list[Response]:
        """End every request with an error."""
        return [self.fail(request_id, error) for request_id in list(self._sequences)]

    def schedule(self) -> Step | None:
        """Choose the next step's tokens and give them KV cache blocks; None if there is nothing to compute."""
        in_generation = sum(sequence.in_generation for sequence in self._running)
        # Generation goes first: each such sequence has its token set aside before context gets the rest.
        context_budget = max(0, self.config.max_num_tokens - in_generation)
        chunks: list[Chunk] = []
        paused = generation = 0
        block_size = self.config.tokens_per_block
        for sequence in list(self._running):
            if sequence.slot < 0 or sequence.complete:
                continue  # paused for an older one, or ended by a token that is on its way
            generates = sequence.in_generation
            if generates and sequence.num_computed < len(sequence.block_ids) * block_size:
                chunks.append(self._next_token(sequence))
                generation += 1
                continue
            length = 1 if generates else self._chunk_length(sequence.num_missing, context_budget, sequence.request)
            if length == 0:
                continue
            paused += self._pause_for(sequence, length)
            if sequence.slot >= 0:
                chunks.append(self._chunk(sequence, length))
                generation += generates
                context_budget -= 0 if generates else length
        if not paused:
            chunks += self._admit(context_budget)
        if not chunks:
            return None
        self._count(chunks, generation, paused)
        chunks.sort(key=lambda chunk: len(chunk.token_ids) > 1)
        return Step(tuple(chunks))

    def is_live(self, chunk: Chunk) -> bool:
        """Whether the chunk's sequence is still in flight: it may have ended since the chunk was scheduled."""
        return not chunk.sequence.ended

    def update(self, step: Step, sampled: Mapping[str, int]) -> list[Generated]:
        """Take in a computed step: `sampled` has the new token of every chunk that samples and is still in flight."""
        generated = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.ended:
                continue
            if self.config.enable_kv_cache_reuse:
                self._publish(sequence, min(chunk.end, sequence.num_computed))
            if chunk.samples:
                sequence.num_pending -= 1
                generated.append(self._append(sequence, sampled[sequence.request.id]))
        return generated

    def stats(self) -> IterationStats:
        return self._stats.model_copy(
            update={
                "active": len(self._running),
                "waiting": len(self._waiting),
                "used_blocks": self.pool.num_blocks - self.pool.num_free,
                "max_blocks": self.pool.num_blocks,
                "generation_requests": (generation := sum(sequence.in_generation for sequence in self._running)),
                "context_requests": len(self._running) - generation,
                "step_context_tokens": self._stats.step_context_tokens if self._running else 0,
                "paused_requests": sum(sequence.paused for sequence in self._waiting),
            }
        )

    def _admissible(self, request: Request) -> Sequence:
        config, length = self.config, len(request.input_token_ids)
        if request.id in self._sequences:
            raise RequestError(f"request id {request.id!r} is in flight already", "use a new one")
        if length >= config.max_seq_len:
            raise RequestError(
                f"Prompt length ({length}) exceeds maximum input length ({config.max_seq_len - 1}). "
                "Shorten the prompt or build the engine with a larger max_seq_len"
            )
        bad_ids = [token_id for word in request.bad_words for token_id in word]
        largest = max(*request.input_token_ids, *bad_ids, *request.embedding_bias, 0)
        if largest >= config.vocab_size:
            raise RequestError(
                f"token id {largest} is outside the vocabulary of {config.vocab_size}",
                "use the model's own tokenizer",
            )
        max_tokens = min(request.max_tokens, config.max_seq_len - length)
        self._check_logits(request, max_tokens)
        sequence = Sequence(request, max_tokens, list(request.input_token_ids))
        # Whoever is paused computes its answer so far again, as context.
        recomputed = sequence.final_tokens if config.batch_scheduler_policy == "max_utilization" else length
        if not config.enable_chunked_context and recomputed > config.max_num_tokens:
            raise RequestError(
                (
                    f"{recomputed} context tokens exceed max_num_tokens ({config.max_num_tokens}) without "
                    "chunked context"
                ),
                "shorten prompt or max_tokens, or serve with enable_chunked_context",
            )
        if self.pool.blocks_for(sequence.final_tokens) > self.pool.num_blocks:
            raise RequestError(
                (
                    f"prompt and answer of {sequence.final_tokens + 1} tokens exceed the KV cache of "
                    f"{self.pool.num_blocks * config.tokens_per_block} tokens"
                ),
                "lower max_tokens",
            )
        return sequence

    def _check_logits(self, request: Request, max_tokens: int) -> None:
        rows = len(request.input_token_ids) * request.output.return_context_logits
        if request.output.return_prompt_log_probs and not self.config.enable_chunked_context:
            rows = max(rows, len(request.input_token_ids))
        rows += max_tokens * request.output.return_generation_logits
        nbytes = 4 * rows * self.config.vocab_size
        if nbytes > MOST_LOGITS_BYTES:
            raise RequestError(
                (
                    f"the logits of {rows} tokens are {nbytes >> 20} MiB, and at most "
                    f"{MOST_LOGITS_BYTES >> 20} MiB are returned"
                ),
                "ask with a shorter prompt or fewer max_tokens",
            )

    def _chunk_length(self, missing: int, budget: int, request: Request) -> int:
        if request.output.return_prompt_log_probs and self.config.enable_chunked_context:
            most = max(self.config.tokens_per_block, MOST_LOGITS_BYTES // (4 * max(1, self.config.vocab_size)))
            budget = min(budget, most)
        if missing <= budget:
            return missing
        if not self.config.enable_chunked_context:
            return 0
        return budget - budget % self.config.tokens_per_block  # only a last chunk may end inside a block

    def _admit(self, budget: int) -> list[Chunk]:
        """Let waiting sequences join, first come first served."""
        chunks: list[Chunk] = []
        while self._waiting and len(self._running) < self.config.max_batch_size:
            sequence = self._waiting[0]
            reused = self._find_reusable(sequence)
            known = len(reused) * self.config.tokens_per_block
            length = self._chunk_length(sequence.num_missing - known, budget, sequence.request)
            if sequence.num_pending or length == 0 or not self._fits(sequence, known + length, reused):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.slot = self._free_slots.pop()
            self.pool.share(reused)
            sequence.block_ids, sequence.num_published = array("i", reused), len(reused)
            sequence.num_computed = known
            sequence.num_reused += len(reused)
            self._stats = self._stats.model_copy(update={"reused_blocks": self._stats.reused_blocks + len(reused)})
            self.pool.grow(sequence.block_ids, known + length)
            chunks.append(self._chunk(sequence, length))
            budget -= length
        return chunks

    def _find_reusable(self, sequence: Sequence) -> list[int]:
        """Blocks that hold how the sequence begins; its last known token is always computed, to sample from."""
        if not self.config.enable_kv_cache_reuse or sequence.request.output.reads_whole_prompt:
            return []
        full = (len(sequence.token_ids) - 1) // self.config.tokens_per_block
        self._extend_keys(sequence, full)
        return self.pool.find(sequence.block_keys[:full])

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        full = num_computed // self.config.tokens_per_block
        self._extend_keys(sequence, full)
        for index in range(sequence.num_published, full):
            self.pool.publish(sequence.block_ids[index], sequence.block_keys[index])
        sequence.num_published = max(sequence.num_published, full)

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        size = self.config.tokens_per_block
        for index in range(len(sequence.block_keys), count):
            before = sequence.block_keys[-1] if index else salt_key(sequence.request.cache_salt)
            sequence.block_keys.append(block_key(before, sequence.token_ids[index * size : (index + 1) * size]))

    def _fits(self, sequence: Sequence, num_tokens: int, reused: list[int]) -> bool:
        """Whether there are blocks for a sequence to join: for its first `num_tokens` tokens, or for its end and
        everyone else's."""
        blocks_for = self.pool.blocks_for
        if self.config.batch_scheduler_policy == "max_utilization":
            needed = blocks_for(num_tokens)
        else:
            promised = sum(blocks_for(other.final_tokens) - len(other.block_ids) for other in self._running)
            needed = promised + blocks_for(sequence.final_tokens)
        return needed - self.pool.num_held(reused) <= self.pool.num_free

    def _pause_for(self, sequence: Sequence, length: int) -> int:
        """Give `sequence` the blocks of its next `length` tokens, pausing the youngest (itself at last) as needed."""
        paused = 0
        while not self.pool.grow(sequence.block_ids, sequence.num_computed + length):
            youngest = self._running.pop()
            self._give_back(youngest)
            youngest.num_computed = 0
            self._waiting.appendleft(youngest)
            paused += 1
            if youngest is sequence:
                break
        return paused

    def _next_token(self, sequence: Sequence) -> Chunk:
        """The chunk of a sequence in its generation phase that has the block for its token."""
        start = sequence.num_computed
        token = placeholder(sequence.slot) if sequence.num_pending else sequence.token_ids[-1]
        sequence.num_computed = start + 1
        sequence.num_pending += 1
        return Chunk(sequence, (token,), start, sequence.block_ids, True, 1)

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        start, end = sequence.num_computed, sequence.num_computed + length
        known = len(sequence.token_ids)
        token_ids = tuple(sequence.token_ids[start:end])
        if end > known:
            token_ids += (placeholder(sequence.slot),)
        samples = end == known + sequence.num_pending
        everything = sequence.request.output.reads_whole_prompt and not sequence.num_output + sequence.num_pending
        sequence.num_computed = end
        sequence.num_pending += samples
        return Chunk(
            sequence=sequence,
            token_ids=token_ids,
            start=start,
            block_ids=sequence.block_ids,
            samples=samples,
            num_logits=length if everything else int(samples),
        )

    def _append(self, sequence: Sequence, token_id: int) -> Generated:
        request = sequence.request
        reason: FinishReason | None = None
        may_end = not request.sampling.min_tokens or sequence.num_output >= request.sampling.min_tokens
        if may_end and token_id == request.end_id:
            self._leave(sequence)
            return Generated(sequence, None, FinishReason.END_ID)
        sequence.token_ids.append(token_id)
        if request.stop_words and may_end and any(sequence.ends_with(word) for word in request.stop_words):
            reason = FinishReason.STOP_WORDS
        elif sequence.num_output == sequence.max_tokens:
            reason = FinishReason.LENGTH
        if reason:
            self._leave(sequence)
        return Generated(sequence, token_id, reason)

    def _leave(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        sequence.ended = True
        if sequence.slot >= 0:
            self._running.remove(sequence)
            self._give_back(sequence)
        else:
            self._waiting.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Free a sequence's blocks and its slot. Steps run in order: one in flight still writes there first."""
        self.pool.release(sequence.block_ids)
        self._free_slots.append(sequence.slot)
        sequence.block_ids, sequence.slot = array("i"), -1

    def _count(self, chunks: list[Chunk], generation: int, paused: int) -> None:
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        stats = self._stats
        self._stats = stats.model_copy(
            update={
                "iterations": stats.iterations + 1,
                "context_tokens": stats.context_tokens + tokens - generation,
                "generation_tokens": stats.generation_tokens + generation,
                "max_active": max(stats.max_active, len(chunks)),
                "paused": stats.paused + paused,
                "step_context_tokens": tokens - generation,
            }
        )

"""Decides each step of in-flight batching. Pure Python: no tensors, no clock, no I/O.

The idea: a sequence has known tokens (prompt and answer so far), and some of them have computed keys and values. A
step computes missing tokens of many sequences at once. If it computes a sequence's last known token, the model's
output gives one more token. A sequence is in its generation phase while only its last token is missing, and in its
context phase before that. A paused sequence has no computed tokens and is in its context phase again.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

from trtqwen.diagnostics import RequestError
from trtqwen.executor.kv_cache import BlockPool, block_key, salt_key
from trtqwen.executor.request import FinishReason, IterationStats, Request, Response
from trtqwen.executor.sequence import Chunk, Generated, SequenceState, Step, placeholder

SchedulerPolicy = Literal["guaranteed_no_evict", "max_utilization"]

# Logits that one request may ask for: they cross two processes and a gRPC message, whose limit is 2 GiB.
MOST_LOGITS_BYTES = 1 << 28
_SHARE_OF_A_TOKEN = 8  # context tokens for each token of a large batch: its own reading of the cache takes as long


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step, by TensorRT-LLM's names; see `recipe.EngineRecipe` and `recipe.ServeRecipe`.

    Attributes:
        context_share: with chunked context, tokens of prompts that a step takes while other requests generate; see
            `config.context_share`. 0 is no limit but `max_num_tokens`.
    """

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
    context_share: int = 0


class Scheduler:
    """Requests wait in order of arrival, run in a shared batch, and leave when they end.

    Under `guaranteed_no_evict` a request joins when the blocks of its whole answer, and those of everyone before
    it, fit into the pool: no request is ever paused. Under `max_utilization` it joins when the next chunk fits; when
    blocks run out the youngest are paused, so the oldest always moves on.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.tokens_per_block)
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._sequences: dict[str, SequenceState] = {}
        self._free_slots = list(reversed(range(config.max_batch_size)))
        self._stats = IterationStats()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def __getitem__(self, request_id: str) -> SequenceState:
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
        """End a request immediately; None if it is not in flight."""
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
        context_budget = self._context_budget()
        chunks: list[Chunk] = []
        paused = generation = 0
        block_size = self.config.tokens_per_block
        for sequence in list(self._running):
            if sequence.slot < 0 or sequence.complete:
                continue  # paused for an older one, or ended by a token of a step in flight
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

    def _context_budget(self) -> int:
        """Tokens of prompts that the next step takes.

        A step gives all its tokens when it ends. Short steps give first tokens sooner, delay the tokens of other
        requests less, and prevent that many requests start and end at the same time. Long steps compute more tokens
        per second and fill a batch sooner. They are better while more requests wait for their first token than
        generate, and the prompts fill more than one step.
        """
        begun = [sequence for sequence in self._running if not sequence.in_generation]
        # Generation goes first: each such sequence has its token set aside before context gets the rest.
        budget = max(0, self.config.max_num_tokens - (len(self._running) - len(begun)))
        share = self.config.context_share
        if not share or not self.config.enable_chunked_context:
            return budget
        generating = sum(sequence.in_generation and not sequence.complete for sequence in self._running)
        room = self.config.max_batch_size - len(self._running)
        whole = missing = 0
        for count, sequence in enumerate(chain(begun, islice(self._waiting, room)), 1):
            missing += sequence.num_missing
            if missing > budget and count > generating:
                return budget
            if whole < share:
                whole = missing
        if generating:
            return min(budget, max(share, _SHARE_OF_A_TOKEN * generating))
        return min(budget, whole)  # whole prompts: no request is interrupted

    def is_live(self, chunk: Chunk) -> bool:
        """Return whether the chunk's sequence is still in flight. It may have ended since the chunk was scheduled."""
        return not chunk.sequence.ended

    def update(self, step: Step, sampled: Mapping[str, int]) -> list[Generated]:
        """Process a computed step: `sampled` has the new token of every chunk that samples and is still in flight."""
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

    def _admissible(self, request: Request) -> SequenceState:
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
        sequence = SequenceState(request, max_tokens, list(request.input_token_ids))
        # A paused request computes its answer so far again, as context.
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
        """Admit waiting sequences, first come first served."""
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

    def _find_reusable(self, sequence: SequenceState) -> list[int]:
        """Blocks that hold how the sequence begins; its last known token is always computed, to sample from."""
        if not self.config.enable_kv_cache_reuse or sequence.request.output.reads_whole_prompt:
            return []
        full = (len(sequence.token_ids) - 1) // self.config.tokens_per_block
        self._extend_keys(sequence, full)
        return self.pool.find(sequence.block_keys[:full])

    def _publish(self, sequence: SequenceState, num_computed: int) -> None:
        full = num_computed // self.config.tokens_per_block
        self._extend_keys(sequence, full)
        for index in range(sequence.num_published, full):
            self.pool.publish(sequence.block_ids[index], sequence.block_keys[index])
        sequence.num_published = max(sequence.num_published, full)

    def _extend_keys(self, sequence: SequenceState, count: int) -> None:
        size = self.config.tokens_per_block
        for index in range(len(sequence.block_keys), count):
            before = sequence.block_keys[-1] if index else salt_key(sequence.request.cache_salt)
            sequence.block_keys.append(block_key(before, sequence.token_ids[index * size : (index + 1) * size]))

    def _fits(self, sequence: SequenceState, num_tokens: int, reused: list[int]) -> bool:
        """Whether there are blocks for a sequence to join: for its first `num_tokens` tokens, or for its end and
        everyone else's."""
        blocks_for = self.pool.blocks_for
        if self.config.batch_scheduler_policy == "max_utilization":
            needed = blocks_for(num_tokens)
        else:
            promised = sum(blocks_for(other.final_tokens) - len(other.block_ids) for other in self._running)
            needed = promised + blocks_for(sequence.final_tokens)
        return needed - self.pool.num_held(reused) <= self.pool.num_free

    def _pause_for(self, sequence: SequenceState, length: int) -> int:
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

    def _next_token(self, sequence: SequenceState) -> Chunk:
        """The chunk of a sequence in its generation phase that has the block for its token."""
        start = sequence.num_computed
        token = placeholder(sequence.slot) if sequence.num_pending else sequence.token_ids[-1]
        sequence.num_computed = start + 1
        sequence.num_pending += 1
        return Chunk(sequence, (token,), start, sequence.block_ids, True, 1)

    def _chunk(self, sequence: SequenceState, length: int) -> Chunk:
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

    def _append(self, sequence: SequenceState, token_id: int) -> Generated:
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

    def _leave(self, sequence: SequenceState) -> None:
        del self._sequences[sequence.request.id]
        sequence.ended = True
        if sequence.slot >= 0:
            self._running.remove(sequence)
            self._give_back(sequence)
        else:
            self._waiting.remove(sequence)

    def _give_back(self, sequence: SequenceState) -> None:
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

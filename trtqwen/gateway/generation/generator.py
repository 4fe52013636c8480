"""The answers of one request: send its sequences through the gate to the engine, and yield their pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from trtqwen.gateway.admission.admission import Ticket
from trtqwen.gateway.admission.auth import CALLER
from trtqwen.gateway.admission.gate import Gate
from trtqwen.gateway.admission.prefix import prefixes
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.answer import Answer
from trtqwen.gateway.generation.inputs import cache_salt, engine_extensions, engine_inputs
from trtqwen.gateway.generation.plan import GenerationPlan, Observation, Piece, Usage
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import ServedModel
from trtqwen.gateway.tracing import current_span


@dataclass
class AnswerGenerator:
    """Runs plans on the replicas.

    Args:
        request_seconds: how long a request may take in all.
        isolates_keys: whether API keys share no KV cache blocks.
        suspect: called with a replica that does not answer.
        prefix_routing: whether a request goes to the replica that has read its beginning.
        observe: called with each plan; its result observes the answers.
    """

    model: ServedModel
    replicas: Sequence[Replica]
    gate: Gate
    metrics: Metrics
    request_seconds: float
    suspect: Callable[[Replica], None]
    prefix_routing: bool = False
    isolates_keys: bool = False
    observe: Callable[[GenerationPlan], Observation] | None = None
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.model.tokenizer.stop_ids)

    def abort_all(self, failure: ApiError) -> None:
        """End every running answer with an error."""
        for replica in self.replicas:
            replica.abort_all(failure)

    async def run(self, plan: GenerationPlan, usage: Usage) -> AsyncGenerator[Piece, None]:
        """Yield pieces of all answers. Close it early to cancel running sequences.

        Raises:
            ApiError: if the request is refused or fails; then all its answers end.
        """
        begun, first = time.monotonic(), True
        deadline = begun + self.request_seconds
        usage.prompt_tokens = sum(map(len, plan.prompts)) // plan.choices
        counts = [len(prompt) + plan.reserved for prompt in plan.prompts]
        observation = None if self.observe is None else self.observe(plan)
        failure: BaseException | None = None
        try:
            with self.gate.places(counts, self._prefixes(plan), plan.priority) as tickets:
                sequences = [
                    self._sequence(plan, index, ticket, usage, deadline) for index, ticket in enumerate(tickets)
                ]
                pieces = sequences[0] if len(sequences) == 1 else _merged(sequences)
                try:
                    async with aclosing(pieces):
                        async for piece in pieces:
                            if first:
                                self.metrics.first_token_seconds.observe(time.monotonic() - begun)
                                first = False
                            if observation is not None:
                                observation.piece(piece)
                            yield piece
                finally:
                    self.metrics.request_seconds.observe(time.monotonic() - begun)
        except BaseException as problem:
            failure = problem
            raise
        finally:
            if observation is not None:
                observation.end(usage, failure)

    def _prefixes(self, plan: GenerationPlan) -> list[tuple[int, ...]]:
        if not self.prefix_routing:
            return []
        block, salt = self.model.limits.tokens_per_block, cache_salt(self.model, plan.sampling, self._caller())
        known = {prompt: prefixes(prompt, block, salt) for prompt in set(plan.prompts)}
        return [known[prompt] for prompt in plan.prompts]

    def _caller(self) -> str:
        """Return the key whose KV cache blocks the current request may reuse; empty for all keys."""
        return CALLER.get().name if self.isolates_keys else ""

    async def _turn(self, ticket: Ticket, deadline: float) -> Replica:
        """Wait for the ticket's turn, and for the replica that the gate picks."""
        queue = current_span().child("queue")
        try:
            return self.replicas[await self.gate.turn(ticket, deadline)]
        finally:
            queue.end()

    async def _sequence(
        self, plan: GenerationPlan, index: int, ticket: Ticket, usage: Usage, deadline: float
    ) -> AsyncGenerator[Piece, None]:
        prompt = plan.prompts[index]
        inputs = engine_inputs(self.model, plan.sampling, prompt, plan.max_tokens, index)
        salt = cache_salt(self.model, plan.sampling, self._caller())
        extensions = engine_extensions(self.model, plan.sampling, salt, CALLER.get().name)
        # A bias takes four bytes for each token of the vocabulary: too much for each of a thousand that wait.
        large = bool(plan.sampling.bias or plan.sampling.allowed)
        if large:
            inputs.clear()
        replica = await self._turn(ticket, deadline)
        if large:
            inputs = engine_inputs(self.model, plan.sampling, prompt, plan.max_tokens, index)
        span = current_span().child(
            "engine", **{"trtqwen.replica": replica.address, "gen_ai.usage.input_tokens": len(prompt)}
        )
        failure: str | None = None
        begun = last = time.monotonic()
        lasted: float | None = None
        self.metrics.replica_sequences.labels(replica.address).inc()
        self.metrics.prompt_tokens.inc(len(prompt))
        self.metrics.request_prompt_tokens.observe(len(prompt))
        answer = Answer(self.model, plan, index, self.stop_ids)
        reserved = plan.reserved
        try:
            identity, left = f"{plan.request_id}-{index}", deadline - begun
            carried = "carrier" in self.model.extensions
            replies = replica.generate(identity, inputs, left, extensions, span.headers, carried=carried)
            async with aclosing(replies):
                async for reply in replies:
                    now = time.monotonic()
                    if not answer.num_tokens and reply.token_ids:
                        span.event("first token")
                    if answer.num_tokens:
                        self.metrics.inter_token_seconds.observe(now - last)
                    last = now
                    if reply.reused_blocks is not None:
                        cached = min(reply.reused_blocks * self.model.limits.tokens_per_block, len(prompt))
                        self.metrics.cached_prompt_tokens.labels(replica.address).inc(cached)
                        if index % plan.choices == 0:
                            usage.cached_tokens = (usage.cached_tokens or 0) + cached
                    before = answer.num_tokens
                    piece = answer.take(reply)
                    usage.output_tokens += answer.num_tokens - before
                    if answer.num_tokens > reserved:
                        more = min(plan.max_tokens, 2 * reserved) - reserved
                        self.gate.grow(ticket, more)
                        reserved += more
                    if answer.finish is not None:
                        lasted = now - begun  # its reader may stop at the last piece
                    if piece is not None:
                        yield piece
                        if piece.finish is not None:
                            break
                else:
                    lasted = time.monotonic() - begun
                    yield answer.end()
        except ApiError as problem:
            failure = problem.code
            if problem.code == "engine_dead":
                self.suspect(replica)
            raise
        finally:
            if answer.only_zeros:
                self.metrics.nan_guard.inc()
            self.metrics.output_tokens.inc(answer.num_tokens)
            self.metrics.request_output_tokens.observe(answer.num_tokens)
            self.gate.give_back(ticket, lasted)
            span.end(failure, **{"gen_ai.usage.output_tokens": answer.num_tokens})


async def _merged(sequences: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of several sequences as they come; the first error ends all."""
    pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=64)

    async def forward(sequence: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(sequence):
                async for piece in sequence:
                    await pieces.put(piece)
            await pieces.put(None)
        except Exception as problem:
            await pieces.put(problem)

    tasks = [asyncio.create_task(forward(sequence)) for sequence in sequences]
    try:
        left = len(tasks)
        while left:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

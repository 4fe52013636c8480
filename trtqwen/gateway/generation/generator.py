"""One request's answers: sequences through the gate to the engine, tokens back as text, and why each ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from trtqwen.gateway.admission.admission import Ticket
from trtqwen.gateway.admission.auth import CALLER
from trtqwen.gateway.admission.gate import Gate
from trtqwen.gateway.admission.prefix import prefixes
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import ApiError, bad_request
from trtqwen.gateway.generation.inputs import Sampling, cache_salt, engine_extensions, engine_inputs
from trtqwen.gateway.generation.upstream import Replica, Reply
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import ServedModel
from trtqwen.gateway.tracing import current_span
from trtqwen.hf.text_stream import StopStrings, TextStream

Finish = Literal["stop", "length", "tool_calls"]
_RESERVED = 1024  # tokens of an answer without a limit of its own, at first
_NAN_TOKENS = 8  # a float16 engine that overflowed answers with token 0, "!" in Qwen's vocabulary, forever


@dataclass(frozen=True)
class TokenLogProb:
    """A token of an answer.

    Attributes:
        text: as bytes; a character may take several tokens.
        log_prob: natural logarithm of its probability; None for the first token of a prompt, which follows nothing.
        start: characters of the answer before the one that it begins or belongs to.
        top: ids and log probabilities of the most likely tokens at its place, if asked for.
    """

    token_id: int
    text: bytes
    log_prob: float | None
    start: int
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """Part of an answer; the last one says why it ended.

    Attributes:
        number: of the answer.
        prompt: the prompt's tokens, with the first piece, if asked for.
        matched: the stop string or the id of the stop token that ended it; None for the model's own end.
    """

    number: int
    text: str
    log_probs: tuple[TokenLogProb, ...] = ()
    finish: Finish | None = None
    matched: str | int | None = None
    prompt: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True)
class GenerationPlan:
    """What the engine is asked for.

    Attributes:
        request_id: unique; the sequences' ids derive from it.
        prompts: token ids, one tuple for each answer, answers of one prompt side by side.
        choices: answers of each prompt.
        max_tokens: of each answer.
        reserved: tokens of each answer that are reserved when it begins; if it gets longer, more are.
        stop: strings that end an answer.
        keep_stop: an answer ends with its stop string, not before it.
        priority: of those of one API key that wait, the requests with the lowest go first.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    choices: int
    max_tokens: int
    sampling: Sampling
    reserved: int
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    priority: int = 0

    @property
    def reserved_tokens(self) -> int:
        """Tokens of all prompts and answers that are reserved when the request begins."""
        return sum(len(prompt) + self.reserved for prompt in self.prompts)


@dataclass
class Usage:
    """Tokens so far; a prompt with several answers counts once.

    Attributes:
        cached_tokens: prompt tokens that the engine had read before; None until it says so.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None


class Observation(Protocol):
    """Sees one request's answers."""

    def piece(self, piece: Piece) -> None:
        """The next piece."""

    def end(self, usage: Usage, failure: BaseException | None) -> None:
        """The end, with what kept the answers from being complete, if anything."""


@dataclass(frozen=True)
class Room:
    """How long an answer may get, and how much of that is reserved when it begins, in tokens."""

    max_tokens: int
    reserved: int


def fit_answer(model: ServedModel, config: GatewayConfig, prompt_tokens: int, asked: int | None) -> Room:
    """The limit of an answer: what was asked for, else what the context leaves.

    Raises:
        ApiError: with the numbers, if the prompt leaves no room or the answer asked for does not fit. LiteLLM and
            LangChain tell these errors by their words, and turn to a model with a longer context.
    """
    context, cache = model.limits.max_seq_len, model.cache_tokens(config.kv_cache_tokens)
    limit, code = (context, "context_length_exceeded") if context <= cache else (cache, "kv_cache_exceeded")
    why = "" if context <= cache else ", as its KV cache holds no more"
    room = limit - prompt_tokens
    if room < 1:
        raise bad_request(
            f"prompt is too long: {prompt_tokens} tokens; this model's maximum context length is {limit} tokens"
            f"{why}; shorten the prompt to {limit - 1} tokens or fewer",
            code=code,
        )
    if asked is None:
        most = min(room, config.default_max_tokens or room, config.max_tokens or room)
        return Room(most, min(most, _RESERVED))
    if config.max_tokens is not None and asked > config.max_tokens:
        raise bad_request(f"max_tokens is {asked}; this server allows {config.max_tokens}", param="max_tokens")
    if asked > room:
        raise bad_request(
            f"max_tokens is too large: {asked}; this model's maximum context length is {limit} tokens{why}, and the "
            f"prompt has {prompt_tokens}; ask for {room} or fewer",
            param="max_tokens",
            code=code,
        )
    return Room(asked, asked)


@dataclass
class Generator:
    """Runs plans on the replicas.

    Args:
        request_seconds: how long a request may take in all.
        isolates_keys: whether API keys share no KV cache blocks.
        suspect: is told of a replica that does not answer.
        prefix_routing: whether a request goes to the replica that has read its beginning.
        observe: is told of each plan that runs; what it returns sees the answers.
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
        """Yield pieces of all answers as they come; close it early to cancel what still runs.

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
        """Whose KV cache blocks the current request may reuse; empty for everyone's."""
        return CALLER.get().name if self.isolates_keys else ""

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
        request = current_span()
        queue = request.child("queue")
        try:
            replica = self.replicas[await self.gate.turn(ticket, deadline)]
        finally:
            queue.end()
        if large:
            inputs = engine_inputs(self.model, plan.sampling, prompt, plan.max_tokens, index)
        span = request.child(
            "engine", **{"trtqwen.replica": replica.address, "gen_ai.usage.input_tokens": len(prompt)}
        )
        failure: str | None = None
        begun = last = time.monotonic()
        lasted: float | None = None
        self.metrics.replica_sequences.labels(replica.address).inc()
        self.metrics.prompt_tokens.inc(len(prompt))
        self.metrics.request_prompt_tokens.observe(len(prompt))
        answer = _Answer(self.model, plan, index, self.stop_ids)
        reserved = plan.reserved
        try:
            identity, left = f"{plan.request_id}-{index}", deadline - begun
            replies = replica.generate(identity, inputs, left, extensions, span.headers)
            async with aclosing(replies):
                async for reply in replies:
                    now = time.monotonic()
                    if not answer.num_tokens and reply.token_ids:
                        span.event("first token")
                    if answer.num_tokens:
                        self.metrics.inter_token_seconds.observe(now - last)
                    last = now
                    usage.output_tokens += len(reply.token_ids)
                    if reply.reused_blocks is not None:
                        cached = min(reply.reused_blocks * self.model.limits.tokens_per_block, len(prompt))
                        self.metrics.cached_prompt_tokens.labels(replica.address).inc(cached)
                        if index % plan.choices == 0:
                            usage.cached_tokens = (usage.cached_tokens or 0) + cached
                    piece = answer.take(reply)
                    if answer.num_tokens > reserved:
                        more = min(plan.max_tokens, 2 * reserved) - reserved
                        self.gate.grow(ticket, more)
                        reserved += more
                    if answer.finish is not None:
                        lasted = now - begun  # whoever reads it may leave with the last piece
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


class _Answer:
    """One sequence on its way from tokens to text."""

    def __init__(self, model: ServedModel, plan: GenerationPlan, index: int, stop_ids: frozenset[int]) -> None:
        sampling = plan.sampling
        self._plan = plan
        self._index = index
        own = stop_ids if sampling.end_id is None else frozenset((sampling.end_id,))
        self._own_stop_ids = frozenset() if sampling.ignore_eos else own
        self._stop_ids = self._own_stop_ids | sampling.stop_ids
        self._token_bytes = model.tokenizer.token_bytes
        self._text = TextStream(self._token_bytes)
        self._stops = StopStrings(plan.stop, keep=plan.keep_stop)
        self._zeros = 0
        self._wants_zeros = sampling.bias.get(0, 0) > 0 or 0 in sampling.allowed
        self._decoded = self._sent = 0  # characters
        self._entries: list[TokenLogProb] = []  # not sent yet
        self._prompt: tuple[TokenLogProb, ...] = ()
        self._stop_id: int | None = None
        self.num_tokens = 0
        self.finish: Finish | None = None

    @property
    def only_zeros(self) -> bool:
        return self._zeros >= _NAN_TOKENS and not self._wants_zeros

    def take(self, reply: Reply) -> Piece | None:
        """Take in new tokens; what of the text is certain, if anything.

        Raises:
            ApiError: if the engine sends nothing but token 0.
        """
        ids = reply.token_ids
        if ids and ids[-1]:
            self._zeros = 0
        else:
            self._guard(ids)
        if reply.prompt:
            self._prompt = self._prompt_entries(reply)
        kept = self._before_stop(ids)
        self.num_tokens += len(ids)
        text = self._decode(kept, reply) if self._plan.sampling.log_probs else self._text.push(kept)
        if self.finish is not None:
            text += self._text.flush()
        text = self._stops.push(text)
        if self._stops.found is not None:
            self.finish = "stop"
        elif self.finish is not None:
            text += self._stops.flush()
        return self._piece(text)

    def end(self) -> Piece:
        """The last piece, when the engine has said all."""
        text = self._stops.push(self._text.flush())
        self.finish = "length" if self.num_tokens >= self._plan.max_tokens else "stop"
        if self._stops.found is None:
            text += self._stops.flush()
        else:
            self.finish = "stop"
        piece = self._piece(text)
        assert piece is not None
        return piece

    def _guard(self, ids: Sequence[int]) -> None:
        if not any(ids):
            self._zeros += len(ids)
        else:
            self._zeros = next(count for count, token_id in enumerate(reversed(ids)) if token_id)
        if self.only_zeros:
            raise ApiError(
                500,
                f"the engine sent token 0 {self._zeros} times in a row, as one does whose float16 overflows; serve "
                "with enable_context_fmha_fp32_acc or in bfloat16",
                "nan_guard",
            )

    def _before_stop(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self._stop_ids.isdisjoint(ids):
            return ids
        for count, token_id in enumerate(ids):
            if token_id in self._stop_ids and self.num_tokens + count >= self._plan.sampling.min_tokens:
                self.finish = "stop"
                self._stop_id = None if token_id in self._own_stop_ids else token_id
                return ids[:count]
        return ids

    def _decode(self, ids: Sequence[int], reply: Reply) -> str:
        """The text of ids, whose log probabilities go along."""
        text = ""
        count = self._plan.sampling.top_log_probs
        for place, (token_id, log_prob) in enumerate(zip(ids, reply.log_probs, strict=False)):
            top = reply.top[place][:count] if reply.top else ()
            self._entries.append(TokenLogProb(token_id, self._bytes(token_id), log_prob, self._decoded, top))
            new = self._text.push((token_id,))
            self._decoded += len(new)
            text += new
        return text

    def _prompt_entries(self, reply: Reply) -> tuple[TokenLogProb, ...]:
        stream, decoded, entries = TextStream(self._token_bytes), 0, []
        count = self._plan.sampling.prompt_log_probs or 0
        for token_id, (log_prob, top) in zip(self._plan.prompts[self._index], reply.prompt, strict=True):
            entries.append(TokenLogProb(token_id, self._bytes(token_id), log_prob, decoded, top[:count]))
            decoded += len(stream.push((token_id,)))
        return tuple(entries)

    def _bytes(self, token_id: int) -> bytes:
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def _piece(self, text: str) -> Piece | None:
        if not self._plan.sampling.log_probs and self.finish is None and not self._prompt:
            return Piece(self._index, text) if text else None
        self._sent += len(text)
        # An answer's tokens end with its text; those of a stop string belong to neither.
        all_sent = self.finish is not None and self._stops.found is None
        ready = [entry for entry in self._entries if all_sent or entry.start < self._sent]
        del self._entries[: len(ready)]
        if text or ready or self.finish is not None or self._prompt:
            prompt, self._prompt = self._prompt, ()
            return Piece(self._index, text, tuple(ready), self.finish, self._stops.found or self._stop_id, prompt)
        return None


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

"""Between Triton requests and the executor: submit requests, send tokens, cancel requests without a client."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trtqwen.diagnostics import TrtQwenError
from trtqwen.executor.request import FinishReason, PromptLogProbs, Response, TopLogProbs
from trtqwen.hf.text_stream import CharacterStream
from trtqwen.triton.carrier import Carrier, Carriers, Sender
from trtqwen.triton.engines import Engine
from trtqwen.triton.extensions import read_extensions
from trtqwen.triton.metrics import Gauges, gauges
from trtqwen.triton.tensors import (
    Generation,
    Limits,
    Part,
    asks_to_stop,
    read_generation,
    write_part,
)

Array = npt.NDArray[Any]
OnFinished = Callable[[int, int], None]
_ERRORS_KEPT = 1024
_LEAST_LOOKS = 8  # for clients of running answers, in one check
STOPPED = "the answer was stopped by another request"


@dataclass(frozen=True)
class _Token:
    """A token of an answer with its log probabilities."""

    token_id: int
    log_prob: float | None
    logits: bytes | None
    top: TopLogProbs | None


class _Progress:
    """One sequence of an answer: tokens that have arrived and are not sent yet.

    Attributes:
        num_tokens: number of arrived tokens.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.num_tokens = 0
        self._characters = CharacterStream(token_bytes)
        self._tokens: list[_Token] = []
        self._ready = 0
        self._cum_log_prob = 0.0
        self._context_logits: bytes | None = None
        self._prompt_log_probs: PromptLogProbs | None = None

    def take(self, response: Response) -> None:
        self._tokens += _tokens(response)
        self.num_tokens += len(response.token_ids)
        self._ready += len(self._characters.push(response.token_ids))
        self._context_logits = response.context_logits or self._context_logits
        self._prompt_log_probs = response.prompt_log_probs or self._prompt_log_probs

    def ready_part(self, response: Response) -> Part | None:
        """Return the tokens that can be sent: up to the end of a character, or all at the end of the answer."""
        if response.finish_reason is not None:
            return self.whole_part((), response)
        ready, self._tokens = self._tokens[: self._ready], self._tokens[self._ready :]
        self._ready = 0
        return self._part((), ready, response) if ready else None

    def whole_part(self, prompt: Sequence[int], response: Response) -> Part:
        """Return the rest."""
        ready, self._tokens = self._tokens, []
        return self._part(prompt, ready, response)

    def _part(self, prompt: Sequence[int], tokens: Sequence[_Token], response: Response) -> Part:
        log_probs = [token.log_prob for token in tokens if token.log_prob is not None]
        self._cum_log_prob += sum(log_probs)
        context_logits, self._context_logits = self._context_logits, None
        prompt_log_probs, self._prompt_log_probs = self._prompt_log_probs, None
        return Part(
            token_ids=[*prompt, *(token.token_id for token in tokens)],
            num_generated=len(tokens),
            log_probs=log_probs,
            cum_log_prob=self._cum_log_prob,
            context_logits=context_logits,
            generation_logits=b"".join(token.logits for token in tokens if token.logits is not None),
            top_log_probs=[token.top for token in tokens if token.top is not None],
            prompt_log_probs=prompt_log_probs,
            perf_metrics=response.perf_metrics,
        )


def _tokens(response: Response) -> list[_Token]:
    count = len(response.token_ids)
    log_probs: Sequence[float | None] = response.log_probs or [None] * count
    logits: list[bytes | None] = [None] * count
    if response.generation_logits is not None:
        size = len(response.generation_logits) // count
        logits = [response.generation_logits[index * size : (index + 1) * size] for index in range(count)]
    tops = [None] * count if response.top_log_probs is None else _split(response.top_log_probs, count)
    return [_Token(*token) for token in zip(response.token_ids, log_probs, logits, tops, strict=True)]


def _split(top: TopLogProbs, count: int) -> list[TopLogProbs | None]:
    """The most likely tokens of several places, place by place."""
    size = len(top.ids) // count
    places = [slice(index * size, (index + 1) * size) for index in range(count)]
    return [TopLogProbs(ids=top.ids[place], log_probs=top.log_probs[place]) for place in places]


@dataclass(frozen=True)
class Carried:
    """An answer whose tokens a carrier brings.

    Attributes:
        place: name of the carrier, and the number that the client gave the answer there.
    """

    carrier: Carrier
    place: tuple[str, int]


class Answer:
    """One Triton request: turns its sequences' tokens into responses. Thread-safe.

    Args:
        carried: place of its only sequence, whose tokens before the last response go to a carrier.

    Attributes:
        looked: the check that looked for its client last.
    """

    def __init__(
        self,
        generation: Generation,
        sender: Sender,
        token_bytes: Sequence[bytes],
        *,
        exclude_input: bool,
        carried: Carried | None = None,
    ) -> None:
        self.carried = carried
        self.looked = 0
        self._generation = generation
        self._sender = sender
        self._exclude_input = exclude_input if generation.exclude_input is None else generation.exclude_input
        self._indices = {request.id: index for index, request in enumerate(generation.requests)}
        self._progress = [_Progress(token_bytes) for _ in generation.requests]
        self._open = set(self._indices)
        self._lock = threading.Lock()

    @property
    def request_ids(self) -> list[str]:
        """Ids of the sequences that have not ended."""
        with self._lock:
            return sorted(self._open)

    def take(self, response: Response) -> None:
        """Send on what the executor has for one sequence; the last one's last response is the final one."""
        with self._lock:
            if response.request_id not in self._open:
                return
            left = self._open - {response.request_id} if response.finish_reason is not None else self._open
            index = self._indices[response.request_id]
            if self.carried is not None and response.finish_reason is None:
                self._progress[index].num_tokens += len(response.token_ids)
                self.carried.carrier.put(self.carried.place[1], response.token_ids)
                return
            part = self._part(index, response)
            if part is not None:
                tensors = write_part(self._generation, index, part)
                if self.carried is not None:
                    tensors["sequence_length"] = np.array([[self._progress[index].num_tokens]], np.int32)
                self._sender.send(tensors, final=not left)
            self._open = left

    def fail(self, error: str) -> list[str]:
        """End the whole request with an error, unless it has ended. Returns the ids of running sequences."""
        with self._lock:
            open_ids = sorted(self._open)
            self._open.clear()
            if open_ids:
                self._sender.fail(error)
            return open_ids

    def lengths(self, request_id: str) -> tuple[int, int]:
        """Tokens of a sequence's prompt and of its answer so far."""
        index = self._indices[request_id]
        return len(self._generation.requests[index].input_token_ids), self._progress[index].num_tokens

    def abandoned(self) -> bool:
        """Return whether the client has disconnected before the end."""
        with self._lock:
            return bool(self._open) and self._sender.abandoned()

    def _part(self, index: int, response: Response) -> Part | None:
        if response.finish_reason is FinishReason.CANCELLED:
            return Part([], 0, [], 0.0)  # as upstream: a cancelled request ends with an empty response
        progress = self._progress[index]
        progress.take(response)
        if self._generation.streaming:
            return progress.ready_part(response)
        prompt = () if self._exclude_input else self._generation.requests[index].input_token_ids
        return None if response.finish_reason is None else progress.whole_part(prompt, response)


class EngineService:
    """Serves Triton requests from an executor. Thread-safe.

    Args:
        token_bytes: what each id stands for.
        on_finished: called with the tokens of prompt and answer of every sequence that ended by itself.
    """

    def __init__(
        self,
        executor: Engine,
        limits: Limits,
        token_bytes: Sequence[bytes],
        *,
        exclude_input: bool,
        on_finished: OnFinished = lambda num_input, num_output: None,
    ) -> None:
        self._executor = executor
        self._limits = limits
        self._token_bytes = token_bytes
        self._exclude_input = exclude_input
        self._on_finished = on_finished
        # Clients may use one id twice or none: the executor gets ids of our own.
        self._ids = map(str, itertools.count())
        self._answers: dict[int, tuple[tuple[str, str | None], Answer]] = {}  # with the ids that stop it
        self._carriers = Carriers()
        self._errors: OrderedDict[str, str] = OrderedDict()
        self._looks = 0
        self._gone: set[int] = set()  # answers whose clients had left at the last look
        self._lock = threading.Lock()

    def handle(
        self,
        request_id: str,
        inputs: Mapping[str, Array],
        sender: Sender,
        *,
        client_id: str | None = None,
        extensions: str = "",
    ) -> None:
        """Serve one request. An error becomes its response.

        Args:
            client_id: another model asks, under an id that no other request has; its client gave it this one, and
                can stop the request by it. If Triton loses an error, that model gets it when it stops the request.
            extensions: `Extensions` as JSON; empty asks for none.
        """
        try:
            own = read_extensions(extensions)
            if asks_to_stop(inputs):
                self._stop(request_id, own.carrier, sender)
            elif own.carry:
                self._carriers.open(own.carry, sender)
            else:
                generation = read_generation(inputs, self._ids, self._limits, own)
                self._generate(request_id, client_id, generation, sender)
        except TrtQwenError as problem:
            sender.fail(str(problem))

    def cancel_abandoned(self) -> None:
        """Cancel the requests of disconnected clients, to free their KV cache blocks. End idle carriers.

        A client counts as disconnected at the second look. Before 25.04, Triton's gRPC server crashes when an answer
        ends before it has dealt with the cancellation of its stream (triton-inference-server/server 7840 and 8078).
        """
        with self._lock:
            answers = [answer for _, answer in self._answers.values()]
        self._looks += 1
        # A look costs as much as a response: if there are many answers, each has its turn in one of ten checks.
        count = max(_LEAST_LOOKS, -(-len(answers) // 10))
        due = sorted(answers, key=lambda answer: (id(answer) not in self._gone, answer.looked))[:count]
        for answer in due:
            answer.looked = self._looks
        gone = [answer for answer in due if answer.abandoned()]
        for answer in gone:
            if id(answer) in self._gone:
                self._cancel(answer)
        self._gone = {id(answer) for answer in gone}
        self._carriers.end_idle()

    def gauges(self) -> Gauges:
        """The engine's metrics.

        Raises:
            EngineError: if the engine has stopped.
        """
        build = self._executor.engine_config.build_config
        return gauges(self._executor.stats(), build, self._executor.resident_bytes)

    def _generate(self, request_id: str, client_id: str | None, generation: Generation, sender: Sender) -> None:
        carried = self._carried(generation)
        answer = Answer(generation, sender, self._token_bytes, exclude_input=self._exclude_input, carried=carried)
        with self._lock:
            self._answers[id(answer)] = ((request_id, client_id), answer)

        def fail(error: str) -> None:
            if client_id is not None:
                self._remember(request_id, error)
            for sequence_id in answer.fail(error):
                self._executor.cancel(sequence_id)

        def take(response: Response) -> None:
            if response.finish_reason is FinishReason.ERROR:
                fail(response.error or "the engine gave no reason")
            elif response.finish_reason is FinishReason.CANCELLED and generation.tell_stop:
                fail(STOPPED)
            else:
                try:
                    answer.take(response)
                    self._count(answer, response)
                except Exception as problem:  # the thread that brings the response serves all requests
                    fail(f"the answer could not be sent: {problem}")
            if not answer.request_ids:
                self._forget(answer)

        try:
            for request in generation.requests:
                self._executor.submit(request, take)
        except TrtQwenError as problem:
            fail(str(problem))
            self._forget(answer)

    def _carried(self, generation: Generation) -> Carried | None:
        """Return the place on the carrier that the request names, if this process has it."""
        if generation.carrier is None or not generation.carriable:
            return None
        carrier = self._carriers.join(generation.carrier[0])
        return None if carrier is None else Carried(carrier, generation.carrier)

    def _stop(self, request_id: str, place: tuple[str, int] | None, sender: Sender) -> None:
        """Stop the answer at a place on a carrier, or those with an id."""
        if not (request_id or place):
            sender.fail("Trying to stop a request but request ID is not provided")  # upstream's text
            return
        with self._lock:
            answers = [answer for ids, answer in self._answers.values() if _is_meant(answer, ids, request_id, place)]
            error = self._errors.pop(request_id, None)
        if error is not None:
            sender.fail(error)
            return
        for answer in answers:
            self._cancel(answer)
        sender.send({}, final=True)

    def _count(self, answer: Answer, response: Response) -> None:
        if response.finish_reason not in (None, FinishReason.CANCELLED):
            self._on_finished(*answer.lengths(response.request_id))

    def _cancel(self, answer: Answer) -> None:
        for request_id in answer.request_ids:
            self._executor.cancel(request_id)

    def _remember(self, request_id: str, error: str) -> None:
        with self._lock:
            self._errors[request_id] = error
            while len(self._errors) > _ERRORS_KEPT:
                self._errors.popitem(last=False)

    def _forget(self, answer: Answer) -> None:
        with self._lock:
            known = self._answers.pop(id(answer), None)
        if known is not None and answer.carried is not None:
            self._carriers.leave(answer.carried.carrier)


def _is_meant(answer: Answer, ids: Collection[str | None], request_id: str, place: tuple[str, int] | None) -> bool:
    if place is None:
        return request_id in ids
    return answer.carried is not None and answer.carried.place == place

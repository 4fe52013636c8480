"""Between Triton requests and the executor: hands requests in, sends tokens out, cancels what nobody waits for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from trtqwen.errors import TrtQwenError
from trtqwen.hf.tokenizer import CharacterStream
from trtqwen.runtime.executor import Executor
from trtqwen.runtime.request import FinishReason, IterationStats, Response
from trtqwen.triton.tensors import Generation, asks_to_stop, read_generation, write_tokens

Array = npt.NDArray[Any]
Gauges = dict[tuple[str, str, str], float]


class Sender(Protocol):
    """The way back to one Triton request's client. Nothing may be called after the final response."""

    def send(self, tensors: Mapping[str, Array], *, final: bool) -> None:
        """Send a response."""

    def fail(self, error: str) -> None:
        """Send an error as the final response."""

    def abandoned(self) -> bool:
        """Whether the client has gone or cancelled."""


class Answer:
    """One Triton request on its way: turns its rows' tokens into responses. Thread-safe."""

    def __init__(
        self, generation: Generation, sender: Sender, token_bytes: Sequence[bytes], *, exclude_input: bool
    ) -> None:
        self._generation = generation
        self._sender = sender
        self._exclude_input = exclude_input if generation.exclude_input is None else generation.exclude_input
        self._rows = {request.id: row for row, request in enumerate(generation.requests)}
        self._characters = [CharacterStream(token_bytes) for _ in generation.requests]
        self._tokens: list[list[int]] = [[] for _ in generation.requests]
        self._open = set(self._rows)
        self._lock = threading.Lock()

    @property
    def request_ids(self) -> list[str]:
        """Ids of the rows that have not ended."""
        with self._lock:
            return sorted(self._open)

    def take(self, response: Response) -> None:
        """Send on what the executor has for one row; the last row's last response is the final one."""
        with self._lock:
            if response.request_id not in self._open:
                return
            ended = response.finish_reason is not None
            if ended:
                self._open.remove(response.request_id)
            row = self._rows[response.request_id]
            token_ids = (self._delta if self._generation.streaming else self._whole)(row, response)
            if ended or token_ids:
                prompt = () if self._with_delta(response) else self._generation.requests[row].input_token_ids
                tensors = write_tokens(self._generation, row, [*prompt, *token_ids], len(token_ids))
                self._sender.send(tensors, final=not self._open)

    def fail(self, error: str) -> list[str]:
        """End the whole request with an error, unless it has ended; returns the ids of rows that still run."""
        with self._lock:
            open_ids = sorted(self._open)
            self._open.clear()
            if open_ids:
                self._sender.fail(error)
            return open_ids

    def abandoned(self) -> bool:
        """Whether the client has gone before the end."""
        with self._lock:
            return bool(self._open) and self._sender.abandoned()

    def _delta(self, row: int, response: Response) -> list[int]:
        ready = self._characters[row].push(response.token_ids)
        if response.finish_reason is FinishReason.CANCELLED:
            return []  # as upstream: a cancelled request ends with an empty response
        return ready if response.finish_reason is None else ready + self._characters[row].flush()

    def _whole(self, row: int, response: Response) -> list[int]:
        self._tokens[row] += response.token_ids
        ended = response.finish_reason not in (None, FinishReason.CANCELLED)
        return self._tokens[row] if ended else []

    def _with_delta(self, response: Response) -> bool:
        """Whether the response goes without the prompt."""
        cancelled = response.finish_reason is FinishReason.CANCELLED
        return self._generation.streaming or self._exclude_input or cancelled


class EngineService:
    """Serves Triton requests from an executor. Thread-safe."""

    def __init__(self, executor: Executor, token_bytes: Sequence[bytes], *, exclude_input: bool) -> None:
        self._executor = executor
        self._token_bytes = token_bytes
        self._exclude_input = exclude_input
        # Clients may use one id twice or none: the executor gets ids of our own.
        self._ids = map(str, itertools.count())
        self._answers: dict[int, tuple[str, Answer]] = {}
        self._lock = threading.Lock()

    def handle(self, client_id: str, inputs: Mapping[str, Array], sender: Sender) -> None:
        """Serve one request; whatever is wrong with it is its own error."""
        try:
            if asks_to_stop(inputs):
                self._stop(client_id, sender)
            else:
                self._generate(client_id, read_generation(inputs, self._ids), sender)
        except TrtQwenError as problem:
            sender.fail(str(problem))

    def cancel_abandoned(self) -> None:
        """Cancel the requests whose clients have gone, so that their KV cache blocks are free for others."""
        with self._lock:
            answers = [answer for _, answer in self._answers.values()]
        for answer in answers:
            if answer.abandoned():
                self._cancel(answer)

    def gauges(self) -> Gauges:
        """Upstream's metrics by family, label and label value; `active` counts waiting requests too, so that
        queues show.

        Raises:
            EngineError: if the engine has died.
        """
        return _gauges(self._executor.stats(), self._executor)

    def _generate(self, client_id: str, generation: Generation, sender: Sender) -> None:
        answer = Answer(generation, sender, self._token_bytes, exclude_input=self._exclude_input)
        with self._lock:
            self._answers[id(answer)] = (client_id, answer)

        def take(response: Response) -> None:
            if response.finish_reason is FinishReason.ERROR:
                self._fail(answer, response.error or "the engine gave no reason")
            else:
                answer.take(response)
            if not answer.request_ids:
                self._forget(answer)

        try:
            for request in generation.requests:
                self._executor.submit(request, take)
        except TrtQwenError as problem:
            self._fail(answer, str(problem))
            self._forget(answer)

    def _stop(self, client_id: str, sender: Sender) -> None:
        if not client_id:
            sender.fail("Trying to stop a request but request ID is not provided")  # upstream's text
            return
        with self._lock:
            answers = [answer for name, answer in self._answers.values() if name == client_id]
        for answer in answers:
            self._cancel(answer)
        sender.send({}, final=True)

    def _cancel(self, answer: Answer) -> None:
        for request_id in answer.request_ids:
            self._executor.cancel(request_id)

    def _fail(self, answer: Answer, error: str) -> None:
        for request_id in answer.fail(error):
            self._executor.cancel(request_id)

    def _forget(self, answer: Answer) -> None:
        with self._lock:
            self._answers.pop(id(answer), None)


def _gauges(stats: IterationStats, executor: Executor) -> Gauges:
    build = executor.engine_config.build_config
    requests = {
        "active": stats.active + stats.waiting,
        "max": build.max_batch_size,
        "scheduled": stats.active,
        "waiting": stats.waiting,
    }
    blocks = {
        "max": stats.max_blocks,
        "free": stats.max_blocks - stats.used_blocks,
        "used": stats.used_blocks,
        "tokens_per": build.tokens_per_block,
        "fraction": stats.used_blocks / stats.max_blocks,
    }
    return {
        **{("nv_trt_llm_request_metrics", "request_type", key): float(value) for key, value in requests.items()},
        **{
            ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", key): float(value)
            for key, value in blocks.items()
        },
        ("nv_trt_llm_general_metrics", "general_type", "iteration_counter"): float(stats.iterations),
    }

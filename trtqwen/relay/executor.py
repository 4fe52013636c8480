"""The base class of the executors for vLLM and the LLM API: requests in flight, queue limit, shutdown."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from trtqwen.artifact.manifest import read_manifest
from trtqwen.artifact.names import TOKENIZER_DIRECTORY
from trtqwen.diagnostics import EngineError, TrtQwenError
from trtqwen.engine.config import Backend, EngineConfig, read_engine_config
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.handle import EngineHandle, OnResponse
from trtqwen.executor.request import FinishReason, IterationStats, Request, Response
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.relay.answer import Answer, Piece

STALL_SECONDS = 300.0
_WATCH_PERIOD = 0.5
_STEP_PERIOD = 0.02
Prepared = TypeVar("Prepared")
T = TypeVar("T")


@dataclass
class _InFlight:
    """A request that has not ended. `task` is None until the event loop has begun it."""

    on_response: OnResponse
    task: asyncio.Task[None] | None = None


class RelayExecutor(EngineHandle, Generic[Prepared]):
    """An engine of another project. Thread-safe; use as a context manager or call `shutdown`.

    Callbacks run on the thread of the event loop: they must be quick and must not raise.

    Args:
        backend: that the engine has to be of.
        verify: read every file of the engine and compare its digest; otherwise only sizes are compared.
        stall_seconds: an engine that sends no token for this time while requests run counts as dead.

    Raises:
        InputError: if the directory is not a finished engine.
        EngineError: if the engine is of another backend.
    """

    def __init__(
        self, engine: Path, config: ExecutorConfig | None, backend: Backend, *, verify: bool, stall_seconds: float
    ) -> None:
        read_manifest(engine, "engine", digests=verify)
        self.engine_config: EngineConfig = read_engine_config(engine)
        if self.engine_config.backend != backend:
            raise EngineError(f"{engine}: is of backend {self.engine_config.backend}", "serve it with that backend")
        self._config = config or ExecutorConfig()
        self._tokenizer = Tokenizer(engine / TOKENIZER_DIRECTORY)
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._running: dict[str, _InFlight] = {}
        self._heard = time.monotonic()
        self._told = 0.0
        self._stats = IterationStats(max_blocks=1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_response: OnResponse) -> None:
        """Send a request; its responses come to `on_response`, the last with a finish reason.

        Raises:
            RequestError: if the engine cannot do what it asks for.
            EngineError: if the engine has died, the queue is full, or the id is in flight already.
        """
        prepared = self._prepare(request)
        with self._lock:
            self._check_alive()
            if request.id in self._running:
                raise EngineError(f"request id {request.id!r} is in flight already", "use a new one")
            limit = self._config.max_queue_size
            if limit and len(self._running) >= self.engine_config.build_config.max_batch_size + limit:
                raise EngineError(f"Maximum queue size of {limit} has been reached, please try again later")
            if not self._running:
                self._heard = time.monotonic()
            self._running[request.id] = _InFlight(on_response)
        self._loop.call_soon_threadsafe(self._begin, request, prepared)

    def cancel(self, request_id: str) -> None:
        """End a request; it answers with finish reason `CANCELLED` unless it has ended already."""
        self._loop.call_soon_threadsafe(self._cancel, request_id)

    @property
    @abstractmethod
    def resident_bytes(self) -> int:
        """Memory of the engine's processes; 0 if it is not known."""

    def stats(self) -> IterationStats:
        """Return the engine's statistics. While requests run, waits for a new token since the last call.

        Raises:
            EngineError: if it has died.
        """
        while self._death is None and self._running and self._heard <= self._told:
            time.sleep(_STEP_PERIOD)
        self._told = time.monotonic()
        self._check_alive()
        self._stats = self._read_stats(self._stats)
        self._check_alive()
        return self._stats

    def shutdown(self) -> None:
        """Stop the engine; requests in flight end with an error. May be called again."""
        self._die("it was shut down")
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._stop_engine()

    @abstractmethod
    def _prepare(self, request: Request) -> Prepared:
        """The request as the engine takes it. Raise a RequestError that names the tensor if it cannot."""

    @abstractmethod
    def _pieces(self, request: Request, prepared: Prepared) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer; closing the generator before its end cancels the request in the engine."""

    @abstractmethod
    def _read_stats(self, before: IterationStats) -> IterationStats:
        """Read the engine's statistics; return `before` if it has none."""

    @abstractmethod
    def _stop_engine(self) -> None:
        """Release the engine, after the event loop has ended."""

    async def _close(self) -> None:
        """Close what belongs to the event loop."""

    async def _alive_after(self, error: str) -> str | None:
        """Return why the engine is dead after a failed request; None if it works."""
        return None

    def _watch(self) -> None:
        """Start the check for a silent engine; call it when the engine serves."""
        asyncio.run_coroutine_threadsafe(self._look_after(), self._loop)

    def _wait(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """The result of work on the event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _end_id(self, request: Request) -> int | None:
        """The id that ends a request's answer; a guided one without one of its own gets the tokenizer's."""
        if request.end_id is None and request.guided_decoding is not None:
            return self._tokenizer.end_id
        return request.end_id

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineError(f"the engine has stopped ({self._death})", "start the server again")

    def _begin(self, request: Request, prepared: Prepared) -> None:
        if (entry := self._running.get(request.id)) is not None:
            entry.task = self._loop.create_task(self._answer(request, prepared))

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            entry = self._running.pop(request_id, None)
        if entry is not None:
            if entry.task is not None:
                entry.task.cancel()
            entry.on_response(Response(request_id=request_id, finish_reason=FinishReason.CANCELLED))

    async def _answer(self, request: Request, prepared: Prepared) -> None:
        answer = Answer(request, self._end_id(request), self.engine_config.build_config.tokens_per_block)
        error = "the engine ended the answer without a reason"
        try:
            async with aclosing(self._pieces(request, prepared)) as pieces:
                async for piece in pieces:
                    self._heard = time.monotonic()
                    response = answer.take(piece)
                    if response is not None:
                        self._deliver(response)
                        if response.finish_reason is not None:
                            return
        except TrtQwenError as problem:
            error = problem.what
        if (death := await self._alive_after(error)) is not None:
            self._die(death)
        self._deliver(Response(request_id=request.id, finish_reason=FinishReason.ERROR, error=error))

    def _deliver(self, response: Response) -> None:
        """Hand a response on, unless its request has ended."""
        with self._lock:
            final = response.finish_reason is not None
            entry = (self._running.pop if final else self._running.get)(response.request_id, None)
        if entry is not None:
            entry.on_response(response)

    async def _look_after(self) -> None:
        while self._death is None:
            await asyncio.sleep(_WATCH_PERIOD)
            if self._running and time.monotonic() - self._heard > self._stall_seconds:
                self._die(f"it sent no token for {self._stall_seconds:g} s while requests waited")

    def _die(self, reason: str) -> None:
        """End all requests with an error. The first reason counts."""
        with self._lock:
            if self._death is not None:
                return
            self._death = reason
            orphans, self._running = self._running, {}
        error = f"the engine has stopped ({reason})"
        for request_id, entry in orphans.items():
            entry.on_response(Response(request_id=request_id, finish_reason=FinishReason.ERROR, error=error))

    async def _end_tasks(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close()

"""Rank 0's loop: read commands, schedule a step, compute it with the other ranks, and send tokens.

In overlapped mode, the loop schedules and launches the next step before it reads the tokens of the current one, so
that the device never waits for the host. The host sees the end of an answer one step late and drops that step's
token. In synchronous mode, the loop reads each step's tokens first. Both modes give the same tokens.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trtqwen.diagnostics import RequestError
from trtqwen.executor.fair_pool import FairPool
from trtqwen.executor.guided import GuidedDecoder, check_installed
from trtqwen.executor.inputs import StepInputs, pack
from trtqwen.executor.output import OutputCollector
from trtqwen.executor.parallel import Communicator, SingleRank
from trtqwen.executor.request import Command, Event, FinishReason, Request, Response
from trtqwen.executor.sampling import Guide, Pending, Sampled, Sampler
from trtqwen.executor.scheduler import Scheduler, SchedulerConfig
from trtqwen.executor.sequence import Chunk, Generated, Step

_CPUS_A_COMPILER = 4  # of one owner's guides, compiled at a time


class Runner(Protocol):
    """Computes steps on this rank's device."""

    def launch(self, inputs: StepInputs, sampled: Tensor) -> Tensor | None:
        """Queue a step.

        Args:
            sampled: the token sampled last in each slot, int64 [slots + 1], on the device.

        Returns:
            float logits of the rows that want them, [rows, vocab_size], on rank 0; None on the other ranks.
        """
        ...


@dataclass(frozen=True)
class CompiledGuide:
    """A guided request with its compiled guide, or the error of the compilation."""

    request: Request
    guide: Guide | RequestError


@dataclass(frozen=True)
class _Flight:
    """A step that is queued on the device."""

    step: Step
    sampling: tuple[Chunk, ...]
    pending: Pending | None


Commands = queue.Queue["Command | CompiledGuide"]
WriteEvents = Callable[[Iterable[Event | Generated]], None]


class StepLoop:
    """Serves requests until its process ends.

    Args:
        write: hands events to the client.
        overlap: schedule a step while the one before runs.
    """

    def __init__(
        self,
        limits: SchedulerConfig,
        runner: Runner,
        sampler: Sampler,
        communicator: Communicator,
        decoder: GuidedDecoder,
        commands: Commands,
        write: WriteEvents,
        *,
        overlap: bool,
    ) -> None:
        self._scheduler = Scheduler(limits)
        self._sampler = sampler
        self._output = OutputCollector()
        self._runner = runner
        self._communicator = communicator
        self._decoder = decoder
        self._compilers = FairPool(max(1, len(os.sched_getaffinity(0)) // _CPUS_A_COMPILER), "compile")
        self._compiling: dict[str, Future[None]] = {}
        self._commands = commands
        self._write = write
        self._overlap = overlap
        self._flight: _Flight | None = None

    def run(self) -> None:
        """Serve forever; waits for a command only when no request is in flight."""
        self._write([Event(ready=True)])
        while True:
            if self._scheduler.idle and self._flight is None:
                self._handle(self._commands.get())
            while not self._commands.empty():
                self._handle(self._commands.get())
            self.step()

    def step(self) -> None:
        """Launch the next step, and finish the one before (overlapped) or this one."""
        try:
            launched = self._launch()
            before, self._flight = self._flight, launched
            if before is not None:
                self._finish(before)
            if launched is not None and self._must_wait(launched):
                self._flight = None
                self._finish(launched)
        except Exception as problem:
            if not isinstance(self._communicator, SingleRank) or _is_fatal(problem):
                raise  # the ranks may be out of step with each other: only a new start helps
            self._flight = None
            self._emit(self._scheduler.fail_all(_reason(problem)))

    def _launch(self) -> _Flight | None:
        step = self._scheduler.schedule()
        if step is None:
            return None
        self._output.scheduled([chunk.sequence for chunk in step.chunks])
        inputs = pack(step, self._scheduler.config.tokens_per_block)
        self._communicator.broadcast(inputs.to_bytes() if self._communicator.size > 1 else b"")
        logits = self._runner.launch(inputs, self._sampler.last_tokens)
        assert logits is not None
        sampling = tuple(chunk for chunk in step.chunks if chunk.samples)
        rows = self._output.computed(step, logits)
        pending = self._sampler.launch(rows, [chunk.sequence for chunk in sampling]) if sampling else None
        self._communicator.share_tokens(self._sampler.last_tokens)
        return _Flight(step, sampling, pending)

    def _must_wait(self, flight: _Flight) -> bool:
        """Return whether the next step depends on this step's tokens."""
        return not self._overlap or any(chunk.sequence.needs_host for chunk in flight.sampling)

    def _finish(self, flight: _Flight) -> None:
        if flight.pending is not None and flight.pending.plain and self._output.plain:
            token_ids = flight.pending.token_ids()
            if min(token_ids) >= 0:
                self._finish_plain(flight, token_ids)
                return
        results = flight.pending.results() if flight.pending is not None else []
        failed: list[Response] = []
        sampled: dict[str, Sampled] = {}
        for chunk, result in zip(flight.sampling, results, strict=True):
            if not self._scheduler.is_live(chunk):
                continue
            if isinstance(result, Sampled):
                sampled[chunk.request_id] = result
            else:
                failed.append(self._scheduler.fail(chunk.request_id, str(result)))
        generated = self._scheduler.update(flight.step, {name: result.token_id for name, result in sampled.items()})
        self._emit(failed + [self._output.complete(g.response(), sampled[g.request_id]) for g in generated])

    def _finish_plain(self, flight: _Flight, token_ids: list[int]) -> None:
        """A fast version of `_finish` for steps that give only tokens, as nearly all steps do."""
        sampled = {chunk.sequence.request.id: token for chunk, token in zip(flight.sampling, token_ids, strict=True)}
        generated = self._scheduler.update(flight.step, sampled)
        events = self._output.timed(generated)
        for one in generated:
            if one.finish_reason is not None:
                self._sampler.forget(one.request_id)
                self._output.forget(one.request_id)
        if events:
            self._write(events)

    def _handle(self, command: Command | CompiledGuide) -> None:
        if isinstance(command, CompiledGuide):
            self._admit_guided(command)
        elif command.request is not None:
            self._accept(command.request)
        elif command.cancel is not None:
            self._cancel(command.cancel)
        elif command.stats:
            stats = self._scheduler.stats()
            waiting = stats.waiting + len(self._compiling)
            self._write([Event(stats=stats.model_copy(update={"waiting": waiting}))])

    def _accept(self, request: Request) -> None:
        self._output.arrived(request)
        try:
            if request.guided_decoding is None:
                self._scheduler.add(request)
            else:
                self._compile(request)
        except RequestError as problem:
            self._emit([_error(request, problem)])

    def _compile(self, request: Request) -> None:
        """Compile the guide outside the step loop, because a large schema takes seconds."""
        check_installed()

        def compile_guide() -> None:
            try:
                prepared, guide = self._decoder.prepare(request)
                self._commands.put(CompiledGuide(prepared, guide))
            except RequestError as problem:
                self._commands.put(CompiledGuide(request, problem))
            except Exception as problem:
                error = RequestError(f"guided decoding is not possible on this server: {problem}")
                self._commands.put(CompiledGuide(request, error))

        self._compiling[request.id] = self._compilers.submit(request.owner, compile_guide)

    def _admit_guided(self, compiled: CompiledGuide) -> None:
        request, guide = compiled.request, compiled.guide
        if request.id not in self._compiling:
            return  # cancelled meanwhile
        del self._compiling[request.id]
        try:
            if isinstance(guide, RequestError):
                raise guide
            self._scheduler.add(request)
            self._sampler.guide(request.id, guide)
        except RequestError as problem:
            self._emit([_error(request, problem)])

    def _cancel(self, request_id: str) -> None:
        response = self._scheduler.cancel(request_id)
        if request_id in self._compiling:
            self._compiling.pop(request_id).cancel()  # it leaves the queue; once begun, its compilation has a limit
            response = Response(request_id=request_id, finish_reason=FinishReason.CANCELLED)
        if response is not None:
            self._emit([response])

    def _emit(self, responses: list[Response]) -> None:
        for response in responses:
            if response.finish_reason is not None:
                self._sampler.forget(response.request_id)
                self._output.forget(response.request_id)
        if responses:
            self._write([Event(response=response) for response in responses])


def _is_fatal(problem: Exception) -> bool:
    """Return whether the device is lost. After a CUDA error, this process cannot use it again."""
    return type(problem).__name__ == "AcceleratorError" or "CUDA error" in str(problem)


def _reason(problem: Exception) -> str:
    if isinstance(problem, torch.OutOfMemoryError):
        return "the step ran out of GPU memory; lower serve.kv_cache_free_gpu_mem_fraction or engine.max_num_tokens"
    return f"the step failed: {problem}"


def _error(request: Request, problem: RequestError) -> Response:
    return Response(request_id=request.id, finish_reason=FinishReason.ERROR, error=str(problem))

"""One rank of the executor in its own process: `python -m trtqwen.executor.worker` with a `WorkerConfig`.

Rank 0 reads commands from standard input, one JSON object a line, decides each step, tells the other ranks, samples,
and writes events to standard output. The other ranks compute what they are told. When standard input closes, the
process ends at once: a client that dies leaves no rank behind.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO

import torch

from trtqwen.checkpoint.reader import read_rank
from trtqwen.diagnostics import EngineError, RequestError, TrtQwenError
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.attention import AttentionBackend, AttentionBatch, PlainAttention
from trtqwen.executor.config import WorkerConfig, scheduler_config
from trtqwen.executor.guided import GuidedDecoder, check_installed
from trtqwen.executor.model import Qwen2Model
from trtqwen.executor.output import OutputCollector
from trtqwen.executor.parallel import Communicator, ProcessGroup, SingleRank
from trtqwen.executor.request import Command, Event, FinishReason, Request, Response
from trtqwen.executor.sampling import Guide, Sampled, Sampler
from trtqwen.executor.scheduler import Chunk, Scheduler, SchedulerConfig, Step
from trtqwen.layout import TOKENIZER_DIRECTORY

_DEVICE = torch.device("cpu")
_DTYPE = torch.float32  # what CPUs compute in; every 16-bit weight is exact in it
_COMPILERS = 4  # guides compiled at a time


@dataclass(frozen=True)
class _Compiled:
    """A guided request whose guide is compiled, or why it could not be."""

    request: Request
    guide: Guide | RequestError


Commands = queue.Queue["Command | _Compiled"]


class StepLoop:
    """Rank 0's loop: take in commands, decide a step, compute it with the other ranks, hand out tokens."""

    def __init__(
        self,
        limits: SchedulerConfig,
        model: Qwen2Model,
        communicator: Communicator,
        decoder: GuidedDecoder,
        commands: Commands,
        events: IO[str],
    ) -> None:
        self._scheduler = Scheduler(limits)
        self._sampler = Sampler()
        self._output = OutputCollector()
        self._model = model
        self._communicator = communicator
        self._decoder = decoder
        self._compilers = ThreadPoolExecutor(_COMPILERS, "compile")
        self._compiling: dict[str, Future[None]] = {}
        self._commands = commands
        self._events = events

    def run(self) -> None:
        """Serve for ever; waits for a command only when no request is in flight."""
        self._write(Event(ready=True))
        while True:
            if self._scheduler.idle:
                self._handle(self._commands.get())
            while not self._commands.empty():
                self._handle(self._commands.get())
            self._step()

    def _handle(self, command: Command | _Compiled) -> None:
        if isinstance(command, _Compiled):
            self._admit_guided(command)
        elif command.request is not None:
            self._accept(command.request)
        elif command.cancel is not None:
            self._cancel(command.cancel)
        elif command.stats:
            stats = self._scheduler.stats()
            waiting = stats.waiting + len(self._compiling)
            self._write(Event(stats=stats.model_copy(update={"waiting": waiting})))

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
        """Compile the guide beside the step loop: a large schema takes seconds, and everyone else goes on."""
        check_installed()

        def compile_guide() -> None:
            try:
                prepared, guide = self._decoder.prepare(request)
                self._commands.put(_Compiled(prepared, guide))
            except RequestError as problem:
                self._commands.put(_Compiled(request, problem))
            except Exception as problem:
                error = RequestError(f"guided decoding is not possible on this server: {problem}")
                self._commands.put(_Compiled(request, error))

        self._compiling[request.id] = self._compilers.submit(compile_guide)

    def _admit_guided(self, compiled: _Compiled) -> None:
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

    def _step(self) -> None:
        step = self._scheduler.schedule()
        if step is None:
            return
        try:
            self._output.scheduled([self._scheduler[chunk.request_id] for chunk in step.chunks])
            self._communicator.broadcast(_encode(step))
            logits = _compute(self._model, step, self._scheduler.config.tokens_per_block)
            assert logits is not None
            responses = self._sample(step, self._output.computed(step, logits))
        except Exception as problem:
            if not isinstance(self._communicator, SingleRank):
                raise  # the ranks may be out of step with each other: only a new start helps
            self._emit(self._scheduler.fail_all(f"the step failed: {problem}"))
            return
        self._emit(responses)

    def _sample(self, step: Step, logits: torch.Tensor) -> list[Response]:
        names = [chunk.request_id for chunk in step.chunks if chunk.samples]
        results = dict(
            zip(names, self._sampler.sample(logits, [self._scheduler[name] for name in names]), strict=True)
        )
        failed = [
            self._scheduler.fail(name, str(result))
            for name, result in results.items()
            if isinstance(result, RequestError)
        ]
        sampled = {name: result for name, result in results.items() if isinstance(result, Sampled)}
        responses = self._scheduler.update(step, {name: result.token_id for name, result in sampled.items()})
        return failed + [self._output.complete(response, sampled[response.request_id]) for response in responses]

    def _emit(self, responses: list[Response]) -> None:
        for response in responses:
            if response.finish_reason is not None:
                self._sampler.forget(response.request_id)
                self._output.forget(response.request_id)
        self._write(*(Event(response=response) for response in responses))

    def _write(self, *events: Event) -> None:
        if events:
            self._events.write("".join(event.model_dump_json(exclude_defaults=True) + "\n" for event in events))
            self._events.flush()


def main() -> None:
    """Run one rank until standard input closes; a failure is told on standard output before leaving."""
    config = WorkerConfig.model_validate_json(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the client, which closes our input
    events, sys.stdout = sys.stdout, sys.stderr  # stray prints must not mix with events
    commands: Commands = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin, commands), daemon=True).start()
    try:
        _run(config, commands, events)
    except TrtQwenError as problem:
        _leave(events, str(problem))
    except Exception as problem:
        _leave(events, f"{type(problem).__name__}: {problem}")


def _run(config: WorkerConfig, commands: Commands, events: IO[str]) -> None:
    torch.set_num_threads(config.threads)
    engine = read_engine_config(config.engine)
    limits = scheduler_config(engine, config.executor)
    mapping = engine.pretrained_config.layout
    communicator: Communicator = (
        ProcessGroup(config.rank, mapping, config.rendezvous) if mapping.world_size > 1 else SingleRank()
    )
    attention = _attention()
    model = Qwen2Model(
        engine.pretrained_config,
        dict(read_rank(config.engine, config.rank)),
        communicator,
        attention,
        int8_layout=engine.int8_layout,
        dtype=_DTYPE,
        device=_DEVICE,
        num_blocks=limits.num_blocks,
        tokens_per_block=limits.tokens_per_block,
        plain=isinstance(attention, PlainAttention),
    )
    communicator.broadcast(b"ready" if config.rank == 0 else None)
    if config.rank == 0:
        decoder = GuidedDecoder(config.engine / TOKENIZER_DIRECTORY, limits.vocab_size)
        StepLoop(limits, model, communicator, decoder, commands, events).run()
    while True:
        _compute(model, _decode(communicator.broadcast(None)), limits.tokens_per_block)


def _attention() -> AttentionBackend:
    """The fast implementation, or the plain one where somebody doubts it."""
    name = os.environ.get("TRTQWEN_ATTENTION", "cpu")
    if name not in ("cpu", "plain"):
        raise EngineError(f"TRTQWEN_ATTENTION is {name!r}", "set it to cpu or plain, or leave it unset")
    if name == "plain":
        return PlainAttention()
    from trtqwen.executor.attention.cpu import CpuAttention  # brings Numba along

    return CpuAttention()


def _compute(model: Qwen2Model, step: Step, tokens_per_block: int) -> torch.Tensor | None:
    return model.forward(AttentionBatch(step, tokens_per_block, _DEVICE))


def _encode(step: Step) -> bytes:
    return json.dumps(asdict(step)).encode()


def _decode(data: bytes) -> Step:
    chunks = json.loads(data)["chunks"]
    return Step(tuple(Chunk(**chunk) for chunk in chunks))


def _error(request: Request, problem: RequestError) -> Response:
    return Response(request_id=request.id, finish_reason=FinishReason.ERROR, error=str(problem))


def _read(lines: IO[str], commands: Commands) -> None:
    for line in lines:
        commands.put(Command.model_validate_json(line))
    os._exit(0)


def _leave(events: IO[str], error: str) -> None:
    events.write(Event(fatal=error).model_dump_json(exclude_defaults=True) + "\n")
    events.flush()
    os._exit(1)


if __name__ == "__main__":
    main()

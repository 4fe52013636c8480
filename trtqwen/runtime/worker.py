"""One rank of the executor, in its own process: `python -m trtqwen.runtime.worker` with a `WorkerConfig` as argument.

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
from dataclasses import asdict
from typing import IO, Any

import torch
from pydantic import ValidationError

from trtqwen.checkpoint.reader import read_rank
from trtqwen.engine.config import read_engine_config
from trtqwen.errors import EngineError, RequestError, TrtQwenError, first_problem
from trtqwen.runtime.attention import AttentionBackend, AttentionBatch, CpuAttention, PlainAttention
from trtqwen.runtime.config import WorkerConfig, scheduler_config
from trtqwen.runtime.model import Qwen2Model
from trtqwen.runtime.parallel import Communicator, ProcessGroup, SingleRank
from trtqwen.runtime.request import FinishReason, Request, Response
from trtqwen.runtime.sampling import Sampler
from trtqwen.runtime.scheduler import Chunk, Scheduler, SchedulerConfig, Step

_DEVICE = torch.device("cpu")
_DTYPE = torch.float32  # what CPUs compute in; every 16-bit weight is exact in it


class StepLoop:
    """Rank 0's loop: take in commands, decide a step, compute it with the other ranks, hand out tokens."""

    def __init__(
        self, limits: SchedulerConfig, model: Qwen2Model, communicator: Communicator, events: IO[str]
    ) -> None:
        self._scheduler = Scheduler(limits)
        self._sampler = Sampler()
        self._model = model
        self._communicator = communicator
        self._events = events

    def run(self, commands: queue.Queue[str]) -> None:
        """Serve for ever; waits for a command only when no request is in flight."""
        self._write({"ready": True})
        while True:
            if self._scheduler.idle:
                self._handle(commands.get())
            while not commands.empty():
                self._handle(commands.get())
            self._step()

    def _handle(self, line: str) -> None:
        command = json.loads(line)
        if "request" in command:
            self._accept(command["request"])
        elif "cancel" in command:
            response = self._scheduler.cancel(command["cancel"])
            if response is not None:
                self._emit([response])
        elif "stats" in command:
            self._write({"stats": self._scheduler.stats().model_dump()})

    def _accept(self, fields: dict[str, Any]) -> None:
        try:
            self._scheduler.add(Request.model_validate(fields))
        except (RequestError, ValidationError) as problem:
            error = str(problem) if isinstance(problem, RequestError) else first_problem(problem)
            self._emit([Response(request_id=fields["id"], finish_reason=FinishReason.ERROR, error=error)])

    def _step(self) -> None:
        step = self._scheduler.schedule()
        if step is None:
            return
        try:
            self._communicator.broadcast(_encode(step))
            logits = _compute(self._model, step, self._scheduler.config.tokens_per_block)
            assert logits is not None
            responses = self._sample(step, logits)
        except Exception as problem:
            self._emit(self._scheduler.fail_all(f"the step failed: {problem}"))
            if not isinstance(self._communicator, SingleRank):
                raise  # the ranks may be out of step with each other: only a new start helps
            return
        self._emit(responses)

    def _sample(self, step: Step, logits: torch.Tensor) -> list[Response]:
        sampling = [chunk.request_id for chunk in step.chunks if chunk.samples]
        tokens = self._sampler.sample(logits, [self._scheduler[request_id] for request_id in sampling])
        failed = [
            self._scheduler.fail(request_id, "the logits are not finite; convert the model to bfloat16")
            for request_id, token in zip(sampling, tokens, strict=True)
            if token is None
        ]
        sampled = {name: token for name, token in zip(sampling, tokens, strict=True) if token is not None}
        return failed + self._scheduler.update(step, sampled)

    def _emit(self, responses: list[Response]) -> None:
        for response in responses:
            if response.finish_reason is not None:
                self._sampler.forget(response.request_id)
        self._write(*({"response": response.model_dump(mode="json")} for response in responses))

    def _write(self, *events: dict[str, Any]) -> None:
        if events:
            self._events.write("".join(json.dumps(event) + "\n" for event in events))
            self._events.flush()


def main() -> None:
    """Run one rank until standard input closes; a failure is told on standard output before leaving."""
    config = WorkerConfig.model_validate_json(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the client, which closes our input
    events, sys.stdout = sys.stdout, sys.stderr  # stray prints must not mix with events
    commands: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin, commands), daemon=True).start()
    try:
        _run(config, commands, events)
    except TrtQwenError as problem:
        _leave(events, str(problem))
    except Exception as problem:
        _leave(events, f"{type(problem).__name__}: {problem}")


def _run(config: WorkerConfig, commands: queue.Queue[str], events: IO[str]) -> None:
    torch.set_num_threads(config.threads)
    engine = read_engine_config(config.engine)
    limits = scheduler_config(engine, config.executor)
    mapping = engine.pretrained_config.layout
    communicator: Communicator = (
        ProcessGroup(config.rank, mapping, config.rendezvous) if mapping.world_size > 1 else SingleRank()
    )
    model = Qwen2Model(
        engine.pretrained_config,
        dict(read_rank(config.engine, config.rank)),
        communicator,
        _attention(),
        int8_layout=engine.int8_layout,
        dtype=_DTYPE,
        device=_DEVICE,
        num_blocks=limits.num_blocks,
        tokens_per_block=limits.tokens_per_block,
    )
    communicator.broadcast(b"ready" if config.rank == 0 else None)
    if config.rank == 0:
        StepLoop(limits, model, communicator, events).run(commands)
    while True:
        _compute(model, _decode(communicator.broadcast(None)), limits.tokens_per_block)


def _attention() -> AttentionBackend:
    """The fast implementation, or the plain one where somebody doubts it."""
    name = os.environ.get("TRTQWEN_ATTENTION", "cpu")
    if name not in ("cpu", "plain"):
        raise EngineError(f"TRTQWEN_ATTENTION is {name!r}; set it to cpu or plain, or leave it unset")
    return PlainAttention() if name == "plain" else CpuAttention()


def _compute(model: Qwen2Model, step: Step, tokens_per_block: int) -> torch.Tensor | None:
    return model.forward(AttentionBatch(step, tokens_per_block, _DEVICE))


def _encode(step: Step) -> bytes:
    return json.dumps(asdict(step)).encode()


def _decode(data: bytes) -> Step:
    chunks = json.loads(data)["chunks"]
    return Step(tuple(Chunk(**chunk) for chunk in chunks))


def _read(lines: IO[str], commands: queue.Queue[str]) -> None:
    for line in lines:
        commands.put(line)
    os._exit(0)


def _leave(events: IO[str], error: str) -> None:
    events.write(json.dumps({"fatal": error}) + "\n")
    events.flush()
    os._exit(1)


if __name__ == "__main__":
    main()

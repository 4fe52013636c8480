"""One rank of the executor in its own process: `python -m trtqwen.executor.worker` with a `WorkerConfig`.

Rank 0 reads commands from standard input, one JSON object per line, schedules each step, tells the other ranks,
samples, and writes events to standard output. The other ranks compute the steps that rank 0 sends. When standard
input closes, the process ends at once: a client that dies leaves no rank behind.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterable
from typing import IO

import torch

from trtqwen.artifact.names import TOKENIZER_DIRECTORY
from trtqwen.diagnostics import TrtQwenError
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.config import WorkerConfig, scheduler_config
from trtqwen.executor.device import choose_device
from trtqwen.executor.guided import GuidedDecoder
from trtqwen.executor.inputs import StepInputs
from trtqwen.executor.loop import Commands, StepLoop
from trtqwen.executor.parallel import Communicator, ProcessGroup, SingleRank
from trtqwen.executor.request import Command, Event
from trtqwen.executor.sequence import Generated
from trtqwen.executor.wire import EventEncoder


def main() -> None:
    """Run one rank until standard input closes. A failure is reported on standard output."""
    config = WorkerConfig.model_validate_json(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the client, which closes our input
    events, sys.stdout = sys.stdout.buffer, sys.stderr  # stray prints must not mix with events
    commands: Commands = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin, commands), daemon=True).start()
    try:
        _run(config, commands, events)
    except TrtQwenError as problem:
        _leave(events, str(problem))
    except Exception as problem:
        _leave(events, f"{type(problem).__name__}: {problem}")


def _run(config: WorkerConfig, commands: Commands, events: IO[bytes]) -> None:
    torch.set_num_threads(config.threads)
    engine = read_engine_config(config.engine)
    choice = choose_device(engine, config.executor, config.rank)
    mapping = engine.pretrained_config.rank_mapping
    communicator: Communicator = SingleRank()
    if choice.kernels == "fused":
        from trtqwen.executor.cuda.start import keep_compiled_kernels

        keep_compiled_kernels()
        from trtqwen.executor.cuda.start import make_runner as make

        if mapping.world_size > 1:
            from trtqwen.executor.cuda.group import CudaGroup

            communicator = CudaGroup(
                config.rank,
                mapping,
                config.rendezvous,
                choice.device,
                hidden_size=engine.pretrained_config.hidden_size,
                dtype=choice.dtype,
            )
    else:
        from trtqwen.executor.plain_runner import make_runner as make

        if mapping.world_size > 1:
            communicator = ProcessGroup(config.rank, mapping, config.rendezvous, choice.device)
    started = make(config, engine, choice, communicator)
    limits = scheduler_config(engine, config.executor, started.num_blocks)
    communicator.broadcast(b"ready" if config.rank == 0 else None)
    gc.collect()
    gc.freeze()  # what is there now stays; collections of the rest are short
    if config.rank == 0:
        encoder = EventEncoder()

        def write(batch: Iterable[Event | Generated]) -> None:
            events.write(encoder.encode(batch))
            events.flush()

        decoder = GuidedDecoder(config.engine / TOKENIZER_DIRECTORY, limits.vocab_size)
        StepLoop(
            limits, started.runner, started.sampler, communicator, decoder, commands, write, overlap=choice.overlap
        ).run()
    while True:
        started.runner.launch(StepInputs.from_bytes(communicator.broadcast(None)), started.sampler.last_tokens)
        communicator.share_tokens(started.sampler.last_tokens)


def _read(lines: IO[str], commands: Commands) -> None:
    for line in lines:
        commands.put(Command.model_validate_json(line))
    os._exit(0)


def _leave(events: IO[bytes], error: str) -> None:
    events.write(EventEncoder().encode([Event(fatal=error)]))
    events.flush()
    os._exit(1)


if __name__ == "__main__":
    main()

"""The load generator: send a workload and record when every piece of every answer arrives.

It runs in separate processes, so that other work of this program, such as a progress bar, does not delay it. A piece
has the time at which it is read. Each process also measures how late its event loop wakes up.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from trtqwen.bench.endpoint import Endpoint, Target, connect
from trtqwen.bench.records import ClientLoad, RequestRecord
from trtqwen.bench.workload import Ask
from trtqwen.diagnostics import ServerError, TrtQwenError

Clock = Callable[[], float]
OnDone = Callable[[RequestRecord], None]
_LAG_PERIOD = 0.01  # seconds between two looks at the event loop
_START_DELAY = 0.05  # seconds until all processes have read their jobs
_PROGRESS_PERIOD = 0.2
_STARTUP_SECONDS = 120


@dataclass(frozen=True)
class Job:
    """The requests of one process in one run.

    Attributes:
        asks: the requests with their places in the workload; those with times are sent at them.
        concurrency: how many are open at a time; None sends each at its time, regardless of open requests.
        start: of the run, on the monotonic clock.
    """

    asks: tuple[tuple[int, Ask], ...]
    concurrency: int | None
    start: float


async def send_all(
    endpoint: Endpoint,
    job: Job,
    *,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    on_done: OnDone = lambda record: None,
) -> list[RequestRecord]:
    """Send the requests of a job and return their records, in the order of the job."""
    if job.concurrency is None:
        return list(
            await asyncio.gather(*(_send_at(endpoint, job, place, clock, sleep, on_done) for place in job.asks))
        )
    records: dict[int, RequestRecord] = {}
    waiting = iter(job.asks)

    async def user() -> None:
        for index, ask in waiting:
            records[index] = await _send(endpoint, index, ask, clock(), clock)
            on_done(records[index])

    await asyncio.gather(*(user() for _ in range(job.concurrency)))
    return [records[index] for index, _ in job.asks]


async def _send_at(
    endpoint: Endpoint,
    job: Job,
    place: tuple[int, Ask],
    clock: Clock,
    sleep: Callable[[float], Awaitable[None]],
    on_done: OnDone,
) -> RequestRecord:
    index, ask = place
    due = job.start + (ask.at or 0.0)
    await sleep(max(0.0, due - clock()))
    record = await _send(endpoint, index, ask, due, clock)
    on_done(record)
    return record


async def _send(endpoint: Endpoint, index: int, ask: Ask, due: float, clock: Clock) -> RequestRecord:
    record = RequestRecord(index, due, ask.max_tokens)
    pieces = record.pieces
    record.sent = clock()
    try:
        outcome = await endpoint.generate(ask, lambda tokens: pieces.append((clock(), tokens)))
    except TrtQwenError as problem:
        record.error = problem.what
    else:
        record.prompt_tokens, record.output_tokens = outcome.prompt_tokens, outcome.output_tokens
        record.token_ids, record.log_probs, record.text = outcome.token_ids, outcome.log_probs, outcome.text
        if not outcome.output_tokens:
            record.error = "the answer is empty"
    # The last token's time, not that of the goodbye behind it.
    record.ended = pieces[-1][0] if record.ok and pieces else clock()
    return record


class _LagMeter:
    """Measures how late the event loop wakes up, and the CPU use of this process."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._cpu, self._begin = time.process_time(), time.monotonic()
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + _LAG_PERIOD
            await asyncio.sleep(_LAG_PERIOD)
            self._lags.append(time.monotonic() - due)

    def stop(self) -> ClientLoad:
        self._task.cancel()
        passed = time.monotonic() - self._begin
        return ClientLoad((time.process_time() - self._cpu) / passed if passed else 0.0, self._lags)


@dataclass(frozen=True)
class RunResult:
    """One run: every request's record in the workload's order, and how busy each client process was."""

    records: tuple[RequestRecord, ...]
    clients: tuple[ClientLoad, ...]


class Clients:
    """Processes that send; they keep their connections from run to run. Use `open_clients`."""

    def __init__(self, pipes: Sequence[Connection], processes: Sequence[Any]) -> None:
        self._pipes = pipes
        self._processes = processes

    def run(
        self,
        asks: Sequence[Ask],
        concurrency: int | None,
        on_progress: Callable[[int, int], None] = lambda a, b: None,
    ) -> RunResult:
        """Send a workload.

        Args:
            concurrency: requests open at a time over all processes; None sends them at their times.
            on_progress: called with the requests done and the tokens received since the call before.

        Raises:
            ServerError: if a process of the generator ends.
        """
        count = min(len(self._pipes), concurrency or len(self._pipes), len(asks))
        start = time.monotonic() + _START_DELAY
        for number, pipe in enumerate(self._pipes[:count]):
            share = tuple((index, ask) for index, ask in enumerate(asks) if index % count == number)
            places = None if concurrency is None else concurrency // count + (number < concurrency % count)
            pipe.send(Job(share, places, start))
        records: list[RequestRecord] = []
        loads: list[ClientLoad] = []
        open_pipes = set(self._pipes[:count])
        while open_pipes:
            for ready in wait(list(open_pipes)):
                assert isinstance(ready, Connection)
                message = self._receive(ready)
                if isinstance(message, tuple):
                    on_progress(*message)
                else:
                    records += message.records
                    loads += message.clients
                    open_pipes.remove(ready)
        return RunResult(tuple(sorted(records, key=lambda record: record.index)), tuple(loads))

    @staticmethod
    def _receive(pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise ServerError("a process of the load generator has ended", "see its message above") from None

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def open_clients(target: Target, processes: int) -> Iterator[Clients]:
    """Start the processes that will send to a target.

    Raises:
        ServerError: if one of them does not start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "uvloop", "trtqwen.bench.endpoint"])  # each run starts new processes
    pipes, children = [], []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        child = context.Process(target=_client, args=(theirs, target), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    clients = Clients(pipes, children)
    try:
        for pipe in pipes:
            if not pipe.poll(_STARTUP_SECONDS):
                raise ServerError("a process of the load generator did not start", "free some memory and try again")
            clients._receive(pipe)
        yield clients
    finally:
        clients.close()


def _client(pipe: Connection, target: Target) -> None:
    """The life of a process that sends."""
    import uvloop

    uvloop.run(_serve(pipe, target))


async def _serve(pipe: Connection, target: Target) -> None:
    loop = asyncio.get_running_loop()
    endpoint = await connect(target)
    pipe.send("ready")
    try:
        while (job := await loop.run_in_executor(None, _next_job, pipe)) is not None:
            pipe.send(await _run(endpoint, job, pipe))
    finally:
        await endpoint.close()


def _next_job(pipe: Connection) -> Job | None:
    try:
        job: Job | None = pipe.recv()
        return job
    except (EOFError, OSError):
        return None  # the parent has ended


async def _run(endpoint: Endpoint, job: Job, pipe: Connection) -> RunResult:
    done = [0, 0]

    def note(record: RequestRecord) -> None:
        done[0] += 1
        done[1] += record.output_tokens

    async def report() -> None:
        while True:
            await asyncio.sleep(_PROGRESS_PERIOD)
            tell()

    def tell() -> None:
        if any(done):
            pipe.send((done[0], done[1]))
            done[:] = [0, 0]

    await asyncio.sleep(max(0.0, job.start - time.monotonic()))
    meter, reporter = _LagMeter(), asyncio.create_task(report())
    try:
        records = await send_all(endpoint, job, on_done=note)
    finally:
        reporter.cancel()
        load = meter.stop()
    tell()
    return RunResult(tuple(records), (load,))

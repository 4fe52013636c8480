"""Several gateway processes behind one port, with one admission, one set of rates and one set of metrics.

The first process serves no client. It owns the listening socket, the broker and the workers. It passes signals on to
them and replaces a worker that is killed or stays stopped. It ends with an error if a worker ends by itself, or if
workers are killed repeatedly.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from trtqwen.diagnostics import ServerError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.system.leftovers import workspace
from trtqwen.system.processes import ending, stopped

if TYPE_CHECKING:
    from trtqwen.gateway.admission.broker import Broker

_MOST_KILLED, _KILLED_SECONDS = 5, 120.0  # workers that may be killed within this many seconds
_STOPPED_SECONDS, _LOOK_SECONDS = 3.0, 0.5
_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # `metrics.SHARED_DIRECTORY`, which may be imported only once it is set


def run_workers(config: GatewayConfig, listener: socket.socket, count: int) -> None:
    """Serve with `count` workers until SIGTERM or SIGINT; running requests finish first. For the main thread.

    Raises:
        InputError: if the config cannot be used.
        ServerError: if a worker ends by itself.
    """
    with workspace("metrics") as metrics:
        os.environ[_METRICS] = str(metrics)
        asyncio.run(_run(config, listener, count))


async def _run(config: GatewayConfig, listener: socket.socket, count: int) -> None:
    from trtqwen.gateway.admission.broker import Broker
    from trtqwen.gateway.admission.rates import open_keys
    from trtqwen.gateway.fleet.engines import load_models
    from trtqwen.gateway.fleet.table import first_table
    from trtqwen.gateway.metrics import Metrics

    load_models(first_table(config))  # report an unusable setting once, not in each worker
    workers = _Workers(config, listener, Broker(open_keys(config), Metrics()))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, workers.ask_to_end)
    for index in range(count):
        await workers.start(index)
    watch = asyncio.create_task(_kill_stopped(workers.processes))
    failure = await workers.keep_up()
    watch.cancel()
    listener.close()
    codes = await workers.end()
    if failure is not None:
        raise ServerError(failure, "see what it wrote before")
    # A worker that has just started has no handler yet, and no client either.
    if any(code not in (0, -signal.SIGTERM) for code in codes):
        raise ServerError(f"gateway workers ended with codes {', '.join(map(str, codes))}")


class _Workers:
    """The worker processes, each with its line to the broker.

    Attributes:
        processes: by the worker's number; one that ended stays until another takes its place.
    """

    def __init__(self, config: GatewayConfig, listener: socket.socket, broker: Broker) -> None:
        self.processes: dict[int, Process] = {}
        self.asked_to_end = False
        self._config = config
        self._listener = listener
        self._broker = broker
        self._sessions: list[asyncio.Task[None]] = []
        self._ends: dict[asyncio.Task[int], int] = {}  # the workers' numbers by the wait for their ends

    async def start(self, index: int) -> None:
        """Start a worker, as a new one or as a replacement."""
        with ExitStack() as theirs:
            ours, ends = [], []
            for _ in range(2):
                own, other = socket.socketpair()
                ours.append(own)
                ends.append(theirs.enter_context(other))
            self._sessions.append(asyncio.create_task(self._broker.serve(ours[0], ours[1])))
            descriptors = [self._listener.fileno(), *(end.fileno() for end in ends)]
            worker = self.processes[index] = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "trtqwen.gateway",
                self._config.model_dump_json(),
                *map(str, descriptors),
                stdin=DEVNULL,
                pass_fds=descriptors,
            )
        self._ends[asyncio.create_task(worker.wait())] = index

    def ask_to_end(self) -> None:
        """Send SIGTERM to every worker that runs."""
        self.asked_to_end = True
        for worker in self.processes.values():
            if worker.returncode is None:
                # Not `send_signal`: it may take the exit code away from asyncio, which reports 255 then.
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)

    async def keep_up(self) -> str | None:
        """Replace each killed worker, until the workers are asked to end.

        Returns:
            Why the gateway fails: a worker ended by itself, or too many were killed; None if they were asked to end.
        """
        from prometheus_client.multiprocess import mark_process_dead

        loop = asyncio.get_running_loop()
        killed: deque[float] = deque(maxlen=_MOST_KILLED)
        while not self.asked_to_end:
            done, _ = await asyncio.wait(self._ends, return_when=asyncio.FIRST_COMPLETED)
            if self.asked_to_end:
                break
            for end in done:
                index, code = self._ends.pop(end), end.result()
                mark_process_dead(self.processes[index].pid)  # type: ignore[no-untyped-call]
                killed.append(loop.time())
                often = len(killed) == _MOST_KILLED and killed[-1] - killed[0] < _KILLED_SECONDS
                if code >= 0 or often:
                    return f"a gateway worker {ending(code)}"
                what = f"gateway worker {index} {ending(code)}; a new one takes its place"
                print(what, file=sys.stderr, flush=True)
                await self.start(index)
        return None

    async def end(self) -> list[int]:
        """End every worker, after its running requests; returns their exit codes."""
        self.ask_to_end()
        codes = await asyncio.gather(*self._ends)
        await asyncio.gather(*self._sessions, return_exceptions=True)
        return codes


async def _kill_stopped(workers: Mapping[int, Process]) -> None:
    """Kill workers that stay stopped (SIGSTOP), because their clients would wait forever. Runs until cancelled."""
    since: dict[int, float] = {}
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        for worker in tuple(workers.values()):
            if not stopped(worker.pid):
                since.pop(worker.pid, None)
            elif loop.time() - since.setdefault(worker.pid, loop.time()) > _STOPPED_SECONDS:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

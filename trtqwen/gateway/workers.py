"""Several gateway processes behind one port, with one admission, one set of rates and one set of metrics.

The first process serves no client. It owns the listening socket, the broker and the workers. It passes signals on to
them, puts a new worker in the place of one that is killed or stays stopped, and ends with an error if one ends by
itself, or if workers are killed again and again.
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

from trtqwen.diagnostics import ServerError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.system.leftovers import workspace
from trtqwen.system.processes import ending, stopped

_MOST_KILLED, _KILLED_SECONDS = 5, 120.0  # workers that may be killed within so many seconds
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
    from prometheus_client.multiprocess import mark_process_dead

    from trtqwen.gateway.admission.broker import Broker
    from trtqwen.gateway.admission.rates import open_keys
    from trtqwen.gateway.fleet.engines import load_models
    from trtqwen.gateway.fleet.table import first_table
    from trtqwen.gateway.metrics import Metrics

    load_models(first_table(config))  # what cannot be used is told once, not by each worker
    broker = Broker(open_keys(config), Metrics())
    workers: dict[int, Process] = {}
    sessions: list[asyncio.Task[None]] = []
    asked = False

    def pass_on(number: signal.Signals) -> None:
        nonlocal asked
        asked = True
        for worker in workers.values():
            if worker.returncode is None:
                # Not `send_signal`: it may take the exit code away from asyncio, which reports 255 then.
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    async def start(index: int) -> asyncio.Task[int]:
        with ExitStack() as theirs:
            ours, ends = [], []
            for _ in range(2):
                own, other = socket.socketpair()
                ours.append(own)
                ends.append(theirs.enter_context(other))
            sessions.append(asyncio.create_task(broker.serve(ours[0], ours[1])))
            descriptors = [listener.fileno(), *(end.fileno() for end in ends)]
            workers[index] = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "trtqwen.gateway",
                config.model_dump_json(),
                *map(str, descriptors),
                stdin=DEVNULL,
                pass_fds=descriptors,
            )
        return asyncio.create_task(workers[index].wait())

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, pass_on, signal.SIGTERM)
    ends_of = {await start(index): index for index in range(count)}
    if asked:
        pass_on(signal.SIGTERM)
    watch = asyncio.create_task(_kill_stopped(workers))
    killed: deque[float] = deque(maxlen=_MOST_KILLED)
    failure: str | None = None
    while not asked and failure is None:
        done, _ = await asyncio.wait(ends_of, return_when=asyncio.FIRST_COMPLETED)
        if asked:
            break
        for end in done:
            index, code = ends_of.pop(end), end.result()
            mark_process_dead(workers[index].pid)  # type: ignore[no-untyped-call]
            killed.append(loop.time())
            often = len(killed) == _MOST_KILLED and killed[-1] - killed[0] < _KILLED_SECONDS
            if code >= 0 or often:
                failure = f"a gateway worker {ending(code)}"
                break
            print(f"gateway worker {index} {ending(code)}; a new one takes its place", file=sys.stderr, flush=True)
            ends_of[await start(index)] = index
    watch.cancel()
    listener.close()
    pass_on(signal.SIGTERM)
    codes = await asyncio.gather(*ends_of)
    await asyncio.gather(*sessions, return_exceptions=True)
    if failure is not None:
        raise ServerError(failure, "see what it wrote before")
    if any(codes):
        raise ServerError(f"gateway workers ended with codes {', '.join(map(str, codes))}")


async def _kill_stopped(workers: Mapping[int, Process]) -> None:
    """Kill workers that stay stopped (SIGSTOP): their clients wait for nothing. Runs until cancelled."""
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

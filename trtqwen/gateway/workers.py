"""Several gateway processes behind one port, with one admission, one set of rates and one set of metrics.

The first process serves no client. It owns the listening socket, the broker and the workers: it passes signals on to
them, and ends with an error if one of them ends by itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from contextlib import ExitStack, suppress

from trtqwen.diagnostics import ServerError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.system.leftovers import workspace

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
    from trtqwen.gateway.fleet.fleet import first_table, load_models
    from trtqwen.gateway.metrics import Metrics

    load_models(first_table(config))  # what cannot be used is told once, not by each worker
    broker = Broker(open_keys(config), Metrics())
    workers: list[Process] = []
    asked = False

    def pass_on(number: signal.Signals) -> None:
        nonlocal asked
        asked = True
        for worker in workers:
            if worker.returncode is None:
                # Not `send_signal`: it may take the exit code away from asyncio, which reports 255 then.
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, pass_on, signal.SIGTERM)
    sessions = []
    for index in range(count):
        with ExitStack() as theirs:
            ours, ends = [], []
            for _ in range(2):
                own, other = socket.socketpair()
                ours.append(own)
                ends.append(theirs.enter_context(other))
            sessions.append(asyncio.create_task(broker.serve(index, ours[0], ours[1])))
            descriptors = [listener.fileno(), *(end.fileno() for end in ends)]
            workers.append(
                await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "trtqwen.gateway",
                    config.model_dump_json(),
                    *map(str, descriptors),
                    stdin=DEVNULL,
                    pass_fds=descriptors,
                )
            )
    listener.close()
    if asked:
        pass_on(signal.SIGTERM)
    ends_of = [asyncio.create_task(worker.wait()) for worker in workers]
    done, _ = await asyncio.wait(ends_of, return_when=asyncio.FIRST_COMPLETED)
    by_itself = not asked
    pass_on(signal.SIGTERM)
    codes = await asyncio.gather(*ends_of)
    await asyncio.gather(*sessions, return_exceptions=True)
    if by_itself:
        code = next(iter(done)).result()
        raise ServerError(f"a gateway worker ended with code {code}", "see what it wrote before")
    if any(codes):
        raise ServerError(f"gateway workers ended with codes {', '.join(map(str, codes))}")

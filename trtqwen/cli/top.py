"""`trtqwen top`: show a running service at a glance."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.live import Live

from trtqwen.cli.output import Json, print_json, stdout
from trtqwen.deploy.show import show_glance
from trtqwen.deploy.top import Watch, metrics_url


def command(
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Read the metrics of this gateway. Repeat it for more. [default: 127.0.0.1:8080]",
        ),
    ] = None,
    triton: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Read this metrics port of Triton. Repeat it for more. [default: 127.0.0.1:8002]",
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Refresh after this many seconds.")] = 2.0,
    window: Annotated[float, typer.Option(min=1, help="Set the seconds that rates and percentiles cover.")] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="Print the figures of one interval and exit.")] = False,
    json: Json = False,
) -> None:
    """Show throughput, latency, queue, KV cache and GPUs of a running service until Ctrl-C. Needs no Prometheus.

    With --json or --once, or if standard output is not a terminal, print the figures of one interval and exit.
    """
    gateways = [metrics_url(address) for address in url or ["127.0.0.1:8080"]]
    tritons = [metrics_url(address) for address in triton or ["127.0.0.1:8002"]]
    watch = Watch(gateways, tritons, window)
    glance = watch.look()
    if json or once or not stdout.is_terminal:
        time.sleep(interval)
        glance = watch.look()
        if json:
            print_json(glance.as_json())
        else:
            stdout.print(show_glance(glance))
        return
    with Live(show_glance(glance), console=stdout, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(show_glance(watch.look()), refresh=True)

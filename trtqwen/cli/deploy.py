"""`trtqwen deploy`: write files for the programs around a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import HELP, Force, Json, print_json, stdout
from trtqwen.deploy.files import Files, write_files
from trtqwen.deploy.monitoring import Monitoring, Targets, monitoring_files
from trtqwen.deploy.rules import Thresholds
from trtqwen.recipe import load_recipe

command = typer.Typer(
    add_completion=False,
    context_settings=HELP,
    help="Write files for Prometheus, Grafana, Docker Compose and Kubernetes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Output = Annotated[Path, typer.Option(help="Write the files to this directory.")]


@command.callback()
def group() -> None:
    """Write files for Prometheus, Grafana, Docker Compose and Kubernetes."""


@command.command()
def monitoring(
    output: Output,
    recipe: Annotated[
        str | None, typer.Argument(help="Scrape as many Triton servers as this recipe has replicas.")
    ] = None,
    gateway: Annotated[
        list[str] | None, typer.Option(help="Scrape this gateway. Repeat it for more.", show_default="127.0.0.1:8080")
    ] = None,
    triton: Annotated[
        list[str] | None,
        typer.Option(help="Scrape this metrics port of Triton. Repeat it for more.", show_default="127.0.0.1:8002"),
    ] = None,
    dcgm: Annotated[list[str] | None, typer.Option(help="Scrape this DCGM exporter. Repeat it for more.")] = None,
    alertmanager: Annotated[list[str] | None, typer.Option(help="Send alerts to this Alertmanager.")] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Replace the threshold of an alert: latency_p99_seconds=5."),
    ] = None,
    interval: Annotated[int, typer.Option(min=1, max=60, help="Set the seconds between two scrapes.")] = 5,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a Prometheus configuration, recording and alert rules, and Grafana dashboards.

    The directory has a compose.yaml that starts Prometheus and Grafana on this machine's loopback. The rules and
    dashboards are the same for all engines. docs/monitoring.md explains each alert.
    """
    defaults = Targets() if recipe is None else Targets.of(load_recipe(recipe))
    targets = defaults.changed(gateway=gateway, triton=triton, dcgm=dcgm, alertmanager=alertmanager)
    plan = Monitoring(targets, Thresholds().changed(threshold or []), interval)
    _write(monitoring_files(plan), output, force, json, f"docker compose -f {output / 'compose.yaml'} up -d")


def _write(files: Files, output: Path, force: bool, json: bool, next_command: str) -> None:
    write_files(files, output, force=force)
    if json:
        print_json({"output": str(output), "files": sorted(files), "next": next_command})
        return
    for name in sorted(files):
        stdout.print(f"wrote {output / name}", highlight=False, markup=False, soft_wrap=True)
    stdout.print(f"next: {next_command}", highlight=False, markup=False, soft_wrap=True)

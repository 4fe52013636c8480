"""`trtqwen deploy`: write files for the programs around a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import HELP, Force, Json, print_json, stdout
from trtqwen.deploy.compose import Compose, compose_files
from trtqwen.deploy.files import Files, write_files
from trtqwen.deploy.image import serving_image
from trtqwen.deploy.kubernetes import kubernetes_files
from trtqwen.deploy.monitoring import Monitoring, Targets, monitoring_files
from trtqwen.deploy.objects import Kubernetes
from trtqwen.deploy.rules import Thresholds
from trtqwen.diagnostics import InputError
from trtqwen.recipe import load_recipe

command = typer.Typer(
    add_completion=False,
    context_settings=HELP,
    help="Write files for Prometheus, Grafana, Docker Compose and Kubernetes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Output = Annotated[Path, typer.Option(help="Write the files to this directory.")]
RecipeName = Annotated[str, typer.Argument(help="Use this recipe: a bundled name, or a YAML file.")]
ServingImageName = Annotated[
    str | None,
    typer.Option("--image", help="Set the tag of the image that runs trtqwen. [default: trtqwen:VERSION-RELEASE]"),
]


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
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Scrape this gateway. Repeat it for more. [default: 127.0.0.1:8080]"),
    ] = None,
    triton: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Scrape this metrics port of Triton. Repeat it for more. [default: 127.0.0.1:8002]",
        ),
    ] = None,
    dcgm: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Scrape this DCGM exporter. Repeat it for more.")
    ] = None,
    alertmanager: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Send alerts to this Alertmanager.")
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Replace the threshold of an alert: latency_p99_seconds=5."),
    ] = None,
    interval: Annotated[int, typer.Option(min=1, max=60, help="Set the seconds between two scrapes.")] = 5,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a Prometheus configuration and Grafana dashboards.

    The directory includes recording and alert rules, and a compose.yaml that starts Prometheus and Grafana on
    loopback. The rules and dashboards are the same for all engines. docs/monitoring.md explains each alert.
    """
    defaults = Targets() if recipe is None else Targets.of(load_recipe(recipe))
    targets = defaults.changed(gateway=gateway, triton=triton, dcgm=dcgm, alertmanager=alertmanager)
    plan = Monitoring(targets, Thresholds().changed(threshold or []), interval)
    _write(monitoring_files(plan), output, force, json, f"docker compose -f {output / 'compose.yaml'} up -d")


@command.command()
def compose(
    recipe: RecipeName,
    output: Output,
    image: ServingImageName = None,
    models: Annotated[
        str, typer.Option(help="Set the directory of the host in which `trtqwen build` ran.")
    ] = "/srv/trtqwen",
    keys: Annotated[str, typer.Option(help="Set the API keys file, relative to compose.yaml.")] = "keys.yaml",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Set the port of the gateway on the host.")] = 8080,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a compose.yaml and a Dockerfile for a recipe.

    Triton runs on the GPUs of the recipe, with the gateway in front of it. Only the gateway is reachable from
    outside. When the services stop, they complete the running answers first.
    """
    loaded = load_recipe(recipe)
    plan = Compose(loaded, serving_image(loaded, image), models, keys, port)
    _write(compose_files(plan), output, force, json, f"docker compose -f {output / 'compose.yaml'} up --build -d")


@command.command()
def kubernetes(
    recipe: RecipeName,
    output: Output,
    image: ServingImageName = None,
    claim: Annotated[
        str | None,
        typer.Option(help="Read the engine from this PersistentVolumeClaim. [default: trtqwen-models]"),
    ] = None,
    model_image: Annotated[
        str | None, typer.Option(help="Read the engine from this OCI image, mounted as a volume (Kubernetes 1.33).")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Set the engine's directory below the root of the volume. [default: engines/RECIPE/engine]"
        ),
    ] = None,
    namespace: Annotated[str, typer.Option(help="Set the namespace of the kustomize files.")] = "trtqwen",
    max_replicas: Annotated[int, typer.Option(min=1, help="Set the largest number of pods for autoscalers.")] = 8,
    nodes: Annotated[
        int, typer.Option(min=1, help="Spread the ranks of each replica over this many nodes (LeaderWorkerSet).")
    ] = 1,
    queue_depth: Annotated[
        int, typer.Option(min=1, help="Add pods when more requests than this wait for each pod.")
    ] = 8,
    throttle_seconds: Annotated[
        float, typer.Option(min=0.1, help="Refuse requests that would wait while the mean latency exceeds this.")
    ] = 3,
    prometheus: Annotated[
        str, typer.Option(help="Set the address of the Prometheus that KEDA asks.")
    ] = "http://prometheus-operated.monitoring.svc:9090",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write kustomize files and a Helm chart. Each pod is one replica: Triton on its GPUs, and a gateway.

    Optional components: autoscaling with KEDA or prometheus-adapter, monitors and rules for the Prometheus operator,
    and an InferencePool for the Gateway API inference extension. docs/kubernetes.md explains them.

    With --nodes, a replica is a group of pods, and the LeaderWorkerSet controller must be installed.
    """
    if claim and model_image:
        raise InputError("--claim and --model-image both name where the engine is", "give one of them")
    loaded = load_recipe(recipe)
    plan = Kubernetes(
        loaded,
        serving_image(loaded, image),
        claim or "trtqwen-models",
        model_image,
        engine,
        max_replicas,
        queue_depth,
        throttle_seconds,
        prometheus,
        namespace,
        nodes,
    )
    _write(kubernetes_files(plan), output, force, json, f"kubectl apply -k {output / 'kustomize'}")


def _write(files: Files, output: Path, force: bool, json: bool, next_command: str) -> None:
    write_files(files, output, force=force)
    if json:
        print_json({"output": str(output), "files": sorted(files), "next": next_command})
        return
    for name in sorted(files):
        stdout.print(f"wrote {output / name}", highlight=False, markup=False, soft_wrap=True)
    stdout.print(f"next: {next_command}", highlight=False, markup=False, soft_wrap=True)

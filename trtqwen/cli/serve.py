"""`trtqwen serve`: serve a model repository with Triton and the gateway until Ctrl-C or SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trtqwen.artifact.manifest import MANIFEST
from trtqwen.cli.output import (
    AdminKeys,
    ApiKeys,
    DryRun,
    GatewaySettings,
    ImageName,
    InContainer,
    Json,
    ModelName,
    ModelsFile,
    NoVerify,
    SkipGates,
    Wheels,
    print_json,
    print_warnings,
    stderr,
    stdout,
)
from trtqwen.containers.commands import plan_serve_container
from trtqwen.containers.docker import run_container
from trtqwen.containers.work import container_options
from trtqwen.diagnostics import InputError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.config import gateway_config as plan_gateway
from trtqwen.gateway.fleet.roster import Roster
from trtqwen.gateway.fleet.table import Target
from trtqwen.gateway.process import GatewayProcess
from trtqwen.recipe import load_recipe
from trtqwen.system.host import read_host
from trtqwen.system.limits import raise_file_limit
from trtqwen.triton.launch import rank_hosts
from trtqwen.triton.ports import Ports
from trtqwen.triton.replicas import TritonReplicas
from trtqwen.triton.supervisor import Supervisor

DEFAULT = Path("triton_repo")
LOOPBACK = "127.0.0.1"


def command(
    recipe: Annotated[str | None, typer.Argument(help="Serve the repository of this recipe in triton_repo/.")] = None,
    repo: Annotated[Path | None, typer.Option(help="Serve this model repository.")] = None,
    models: ModelsFile = None,
    admin_keys: AdminKeys = None,
    host: Annotated[str, typer.Option(help="Set the listen address of the gateway.")] = LOOPBACK,
    triton_host: Annotated[
        str, typer.Option(help="Set Triton's listen address. Triton has no authentication and no rate limits.")
    ] = LOOPBACK,
    http_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Open Triton's HTTP endpoint on this port; 0 picks a free one."),
    ] = None,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Set Triton's gRPC port; 0 picks a free one.")
    ] = 8001,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Set Triton's metrics port; 0 picks a free one.")
    ] = 8002,
    gateway_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Set the port of the gateway; 0 picks a free one.")
    ] = 8080,
    rank_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:RANKS",
            help="Start this many ranks of a TensorRT engine on this host. Repeat it for more; name this host first.",
        ),
    ] = None,
    rank_shell: Annotated[
        str | None,
        typer.Option(
            help="Start ranks on other hosts with this program, called with host and command. [default: ssh]"
        ),
    ] = None,
    api_keys: ApiKeys = None,
    gateway_config: GatewaySettings = None,
    model_name: ModelName = None,
    no_verify: NoVerify = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start the engine or the gateway again when it ends or hangs.")
    ] = False,
    watchdog: Annotated[
        float,
        typer.Option(
            min=0, help="Call an engine hung after this many seconds without a finished step; 0 turns it off."
        ),
    ] = 20,
    no_gateway: Annotated[bool, typer.Option("--no-gateway", help="Serve Triton alone.")] = False,
    log: Annotated[
        Path | None,
        typer.Option(help="Write Triton's log to this file; several replicas write FILE-0, FILE-1 and so on."),
    ] = None,
    dry_run: DryRun = False,
    in_container: InContainer = False,
    image: ImageName = None,
    wheels: Wheels = None,
    skip_gates: SkipGates = False,
    json: Json = False,
) -> None:
    """Serve a model repository with Triton Inference Server and a web gateway; Ctrl-C drains and stops.

    The gateway serves the OpenAI routes and a chat page at /. Beyond loopback it requires --api-keys. `trtqwen
    gateway` runs a gateway alone, in front of several Triton servers.

    With --models, serve the models of a table instead. `trtqwen models` adds, replaces and removes them while clients
    are served. The command starts Triton on free ports for each target without an address.

    If the recipe sets serve.replicas, the command starts one Triton for each replica, on its own GPUs. The ports of
    each further replica are higher by 10. `trtqwen gateway --help` says which replica gets a request.

    With --in-container, RECIPE selects the image and the number of GPUs. Add --repo if the repository is not in
    triton_repo/. `trtqwen build --help` says what a container needs.
    """

    def gateway_settings(repository: Path | None, triton: tuple[str, ...] | None) -> GatewayConfig:
        place = {"repository": repository, "triton": triton, "host": host, "port": gateway_port, "models": models}
        keys = {"api_keys": api_keys, "admin_keys": admin_keys}
        return plan_gateway(gateway_config, **place, **keys, model_name=model_name)

    if no_gateway and host != LOOPBACK:
        raise InputError(
            f"--host {host} is the gateway's address, but --no-gateway is set", "use --triton-host instead"
        )
    if models is not None:
        if recipe or repo or no_gateway or in_container or dry_run or rank_host:
            raise InputError(
                "--models excludes RECIPE, --repo, --no-gateway, --in-container, --dry-run and --rank-host",
                "give --models alone; its targets name the repositories",
            )
        raise_file_limit()
        _serve_models(models, gateway_settings(None, None), triton_host, watchdog, log, not no_verify, restart, json)
        return
    if in_container:
        if rank_host:
            raise InputError(
                "--rank-host does not work with --in-container", "start serve in a container on each host"
            )
        if recipe is None:
            raise InputError("--in-container needs a recipe for the image and the number of GPUs", "name the recipe")
        loaded = load_recipe(recipe)
        served = repo or DEFAULT / loaded.name
        settings = gateway_settings(served, (f"{triton_host}:{grpc_port}",))
        flags = [f"--host={host}", f"--triton-host={triton_host}"]
        flags += [f"--http-port={http_port}"] if http_port is not None else []
        flags += [f"--grpc-port={grpc_port}", f"--watchdog={watchdog:g}"]
        flags += [f"--metrics-port={metrics_port}", f"--gateway-port={gateway_port}"]
        flags += [f"--api-keys={api_keys.resolve()}"] if api_keys else []
        flags += [f"--admin-keys={admin_keys.resolve()}"] if admin_keys else []
        flags += [f"--gateway-config={gateway_config.resolve()}"] if gateway_config else []
        flags += [f"--model-name={model_name}"] if model_name else []
        given_flags = {"restart": restart, "no-verify": no_verify, "no-gateway": no_gateway, "json": json}
        flags += [f"--{name}" for name, given in given_flags.items() if given]
        files = [file.resolve() for file in (gateway_config, settings.api_keys, settings.admin_keys) if file]
        options = container_options(read_host(), image, wheels, skip_gates=skip_gates)
        plan = plan_serve_container(loaded, served, flags, files, log, options)
        print_warnings(plan.warnings)
        if not dry_run:
            run_container(plan)
        _print_dry_run({"container": plan.command}, plan.shell(), json)
        return
    repository = _choose(recipe, repo)
    ports = Ports(http_port, grpc_port, metrics_port)
    server = TritonReplicas(
        repository,
        ports=ports,
        host=triton_host,
        log=log,
        verify=not no_verify,
        watchdog_seconds=watchdog,
        spread=rank_hosts(rank_host or (), rank_shell),
    )
    if dry_run:
        launches = server.launches()
        commands = [{"command": launch.command, "environment": dict(launch.environment)} for launch in launches]
        content = {"repository": str(repository), **commands[0], "servers": commands}
        _print_dry_run(content, "\n".join(launch.shell() for launch in launches), json)
        return
    raise_file_limit()
    gateway = None
    if not no_gateway:
        gateway = GatewayProcess(
            gateway_settings(repository, server.grpc_urls),
            frozen_seconds=watchdog,
            engine_seconds=max(one.start_seconds for one in server.servers),
        )
    stderr.print(f"starting Triton on {repository} ...", highlight=False)
    supervisor = Supervisor(
        server.servers,
        gateway,
        restart=restart,
        on_ready=lambda: _announce(repository, server, gateway, json),
        on_change=gateway.tell if gateway else lambda state: None,
        say=lambda line: stderr.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    try:
        supervisor.run()
    finally:
        if gateway:
            gateway.close()
    stderr.print("stopped", highlight=False)


def _serve_models(
    models: Path,
    settings: GatewayConfig,
    host: str,
    watchdog: float,
    log: Path | None,
    verify: bool,
    restart: bool,
    json: bool,
) -> None:
    def make(target: Target) -> TritonReplicas:
        own_log = log.with_name(f"{log.stem}-{target.name}{log.suffix}") if log else None
        ports = Ports(None, 0, 0)
        return TritonReplicas(
            target.repository,
            ports=ports,
            host=host,
            log=own_log,
            verify=verify,
            watchdog_seconds=watchdog,
            gpus=target.gpus,
        )

    gateway = GatewayProcess(settings, frozen_seconds=watchdog)
    roster = Roster(models, make, gateway.told)

    def ready() -> None:
        if json:
            servers = [{"grpc": one.grpc_url, "metrics": f"{one.metrics_url}/metrics"} for one in roster.servers]
            print_json({"models": str(models), "gateway": gateway.url, "servers": servers})
        else:
            stdout.print(f"ready: gateway {gateway.url}", highlight=False, soft_wrap=True)

    supervisor = Supervisor(
        roster.servers,
        gateway,
        restart=restart,
        on_ready=ready,
        on_change=lambda state: gateway.tell({**state, "engines": roster.told}),
        say=lambda line: stderr.print(line, markup=False, highlight=False, soft_wrap=True),
        roster=roster,
    )
    stderr.print(f"starting the models of {models} ...", highlight=False)
    try:
        supervisor.run()
    finally:
        gateway.close()
    stderr.print("stopped", highlight=False)


def _announce(repository: Path, server: TritonReplicas, gateway: GatewayProcess | None, json: bool) -> None:
    replicas = [
        ({"http": one.http_url} if one.ports.http is not None else {})
        | {"grpc": one.grpc_url, "metrics": f"{one.metrics_url}/metrics"}
        for one in server.servers
    ]
    endpoints, several = dict(replicas[0]), {"servers": replicas} if replicas[1:] else {}
    if gateway:
        endpoints["gateway"] = gateway.url
    if json:
        print_json({"repository": str(repository), **endpoints, **several})
        return
    ready = ", ".join(f"{name} {url}" for name, url in endpoints.items())
    stdout.print(f"ready: {ready}", highlight=False, soft_wrap=True)
    for number, replica in enumerate(replicas[1:], 1):
        places = ", ".join(f"{name} {url}" for name, url in replica.items())
        stdout.print(f"       replica {number}: {places}", highlight=False, soft_wrap=True)
    stdout.print(f'try:   trtqwen infer "Hello" --url {endpoints["grpc"]}', highlight=False)
    if gateway:
        stdout.print(f"       or chat at {gateway.url}", highlight=False)


def _print_dry_run(content: dict[str, Any], text: str, json: bool) -> None:
    if json:
        print_json(content)
    else:
        stdout.print(text, markup=False, highlight=False, soft_wrap=True)


def _choose(recipe: str | None, repo: Path | None) -> Path:
    if recipe and repo:
        raise InputError("both a recipe and --repo name a repository", "give one of them")
    if repo:
        return repo
    if recipe:
        return DEFAULT / load_recipe(recipe).name
    built = sorted(path.parent for path in DEFAULT.glob(f"*/{MANIFEST}"))
    if len(built) != 1:
        if not built:
            raise InputError(
                f"{DEFAULT}: holds no repository", "build a recipe first: `trtqwen build RECIPE --model DIR`"
            )
        names = ", ".join(path.name for path in built)
        raise InputError(f"{DEFAULT}: holds {len(built)} repositories ({names})", "name a recipe or pass --repo")
    return built[0]

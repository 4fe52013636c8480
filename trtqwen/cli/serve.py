"""`trtqwen serve`: Triton on a model repository, until Ctrl-C or SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.artifact import MANIFEST
from trtqwen.cli.output import Json, print_json, stderr, stdout
from trtqwen.errors import InputError
from trtqwen.recipe import load_recipe
from trtqwen.triton.server import Ports, TritonServer, serve_until_signal

DEFAULT = Path("triton_repo")


def command(
    recipe: Annotated[
        str | None, typer.Argument(help="Recipe whose repository is served, from triton_repo/.")
    ] = None,
    repo: Annotated[Path | None, typer.Option(help="Model repository to serve.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8002,
    log: Annotated[Path | None, typer.Option(help="File for Triton's log.")] = None,
    json: Json = False,
) -> None:
    """Serve a model repository with Triton Inference Server; Ctrl-C drains and stops."""
    repository = _choose(recipe, repo)
    server = TritonServer(repository, ports=Ports(http_port, grpc_port, metrics_port), host=host, log=log)
    with serve_until_signal(server):
        stderr.print(f"starting Triton on {repository} ...", highlight=False)
        server.wait_until_ready()
        endpoints = {"http": server.http_url, "grpc": server.grpc_url, "metrics": f"{server.metrics_url}/metrics"}
        if json:
            print_json({"repository": str(repository), **endpoints})
        else:
            stdout.print("ready: " + ", ".join(f"{name} {url}" for name, url in endpoints.items()), highlight=False)
            stdout.print(f'try:   trtqwen infer "Hello" --url {server.grpc_url}', highlight=False)
    stderr.print("stopped", highlight=False)


def _choose(recipe: str | None, repo: Path | None) -> Path:
    if recipe and repo:
        raise InputError("both a recipe and --repo name a repository; give one of them")
    if repo:
        return repo
    if recipe:
        return DEFAULT / load_recipe(recipe).name
    built = sorted(path.parent for path in DEFAULT.glob(f"*/{MANIFEST}"))
    if len(built) != 1:
        names = ", ".join(path.name for path in built) or "none"
        raise InputError(f"{DEFAULT}: holds {len(built)} repositories ({names}); name a recipe or pass --repo")
    return built[0]

"""`trtqwen models`: change what a running gateway serves, without losing a request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trtqwen.cli.output import HELP, Json, print_json, stderr, stdout
from trtqwen.gateway.fleet import client
from trtqwen.gateway.fleet.client import Admin, admin_key, new_target
from trtqwen.gateway.fleet.report import lines, report
from trtqwen.gateway.fleet.table import ModelEntry

command = typer.Typer(
    add_completion=False,
    context_settings=HELP,
    help="Add, replace, compare and remove the models of a running gateway.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(help="Name of the model, as clients give it.")]
Url = Annotated[str, typer.Option(help="Ask this gateway.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="Read the admin key from this file. [default: the variable TRTQWEN_ADMIN_KEY]"),
]
Repo = Annotated[Path | None, typer.Option(help="Serve this model repository.")]
Triton = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Use the running Triton at this gRPC address. Repeat it for more replicas. Without it, "
        "`trtqwen serve` starts Triton.",
    ),
]
Gpus = Annotated[
    list[int] | None, typer.Option("--gpu", metavar="INDEX", help="Start Triton on this GPU. Repeat it for more.")
]
TargetName = Annotated[
    str | None, typer.Option("--name", help="Set the target's name. [default: the repository's name]")
]
Share = Annotated[float, typer.Option(min=0.1, max=100, help="Set the share of the requests in percent.")]
Drain = Annotated[bool, typer.Option(help="Wait until requests on removed engines have ended.")]
LOCAL = "http://127.0.0.1:8080"


@command.callback()
def group() -> None:
    """Add, replace, compare and remove the models of a running gateway.

    The gateway needs a table of models and admin keys: `trtqwen serve --models FILE --admin-keys FILE`. A change
    takes effect when the new engine is warm. One that cannot be used changes nothing. docs/several-models.md
    explains it.
    """


@command.command("list")
def show(url: Url = LOCAL, key_file: KeyFile = None, json: Json = False) -> None:
    """List the models with their targets and the changes in progress."""
    status = Admin(url, admin_key(key_file)).status()
    if json:
        print_json(status)
        return
    for line in client.status_lines(status):
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, model in status["models"].items():
        if model["problem"]:
            stderr.print(f"warning: {name}: {model['problem']}", markup=False, highlight=False, soft_wrap=True)


@command.command("set")
def replace(
    model: Name,
    repo: Annotated[Path, typer.Option(help="Serve this model repository.")],
    triton: Triton = None,
    gpus: Gpus = None,
    name: TargetName = None,
    drain: Drain = True,
    url: Url = LOCAL,
    key_file: KeyFile = None,
    json: Json = False,
) -> None:
    """Add a model, or replace its engine. The steps are start, warm up, switch and drain."""
    target = new_target(repo, triton, gpus, name)
    _change(Admin(url, admin_key(key_file)), model, lambda entry: client.replaced(entry, target), drain, json)


@command.command()
def canary(
    model: Name,
    share: Share,
    repo: Repo = None,
    triton: Triton = None,
    gpus: Gpus = None,
    name: TargetName = None,
    drain: Drain = True,
    url: Url = LOCAL,
    key_file: KeyFile = None,
    json: Json = False,
) -> None:
    """Send a share of the requests to a second engine. Each API key stays with one engine.

    Without --repo, change the share of the target --name.
    """
    target = client.target_or_name(repo, triton, gpus, name)
    edit = lambda entry: client.with_canary(entry, target, share, model)  # noqa: E731
    _change(Admin(url, admin_key(key_file)), model, edit, drain, json)


@command.command()
def shadow(
    model: Name,
    share: Share = 100,
    repo: Repo = None,
    triton: Triton = None,
    gpus: Gpus = None,
    name: TargetName = None,
    drain: Drain = True,
    url: Url = LOCAL,
    key_file: KeyFile = None,
    json: Json = False,
) -> None:
    """Copy a share of the requests to a second engine.

    `trtqwen models report` compares its answers and latency. Clients get the answers of the stable target only.
    """
    target = client.target_or_name(repo, triton, gpus, name)
    edit = lambda entry: client.with_shadow(entry, target, share, model)  # noqa: E731
    _change(Admin(url, admin_key(key_file)), model, edit, drain, json)


@command.command()
def promote(
    model: Name,
    name: TargetName = None,
    drain: Drain = True,
    url: Url = LOCAL,
    key_file: KeyFile = None,
    json: Json = False,
) -> None:
    """Let the canary or shadow serve the model alone."""
    edit = lambda entry: client.promoted(entry, name, model)  # noqa: E731
    _change(Admin(url, admin_key(key_file)), model, edit, drain, json)


@command.command()
def rollback(
    model: Name, drain: Drain = True, url: Url = LOCAL, key_file: KeyFile = None, json: Json = False
) -> None:
    """Let the stable target serve the model alone."""
    edit = lambda entry: client.rolled_back(entry, model)  # noqa: E731
    _change(Admin(url, admin_key(key_file)), model, edit, drain, json)


@command.command()
def remove(model: Name, drain: Drain = True, url: Url = LOCAL, key_file: KeyFile = None, json: Json = False) -> None:
    """Remove a model. Running requests finish."""
    _change(Admin(url, admin_key(key_file)), model, lambda entry: None, drain, json)


@command.command("report")
def compare(
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help=f"Read the metrics of this gateway. Repeat it for more. [default: {LOCAL}]"),
    ] = None,
    json: Json = False,
) -> None:
    """Compare latency, failures and answers of each target. Needs no admin key.

    A difference counts at three standard errors and with 30 requests on both sides. The figures count from
    the start of the gateway.
    """
    models = report(client.read_metrics(url or [LOCAL]))
    if json:
        print_json({"models": [model.as_json() for model in models]})
        return
    for line in lines(models):
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def _change(admin: Admin, model: str, edit: Any, drain: bool, json: bool) -> None:
    def noted(entry: ModelEntry | None) -> ModelEntry | None:
        wanted: ModelEntry | None = edit(entry)
        if not json:
            stderr.print(f"{model}: waiting for the gateway to switch ...", highlight=False)
        return wanted

    answer = admin.change(model, noted)
    if drain:
        admin.drained()
    if json:
        print_json(answer)
    else:
        stdout.print(f"{model}: done", highlight=False)

"""The command line: parse, call, print. Errors end in one sentence and an exit code (1 failed, 2 bad input)."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from trtqwen import __version__
from trtqwen.cli.output import print_json
from trtqwen.diagnostics import Diagnostic, TrtQwenError

# Each is a module here with a function (or, for a command with subcommands, a Typer) named `command`.
COMMANDS = {
    "demo": "The whole way on this machine, with the bundled model.",
    "convert": "Hugging Face weights to a TensorRT-LLM checkpoint.",
    "export": "A TensorRT-LLM checkpoint back to a Hugging Face directory.",
    "verify": "Compare a checkpoint with the model it was made from.",
    "recipe": "List, show and check recipes.",
    "plan": "Memory, concurrency and speed of a recipe, before a GPU is touched.",
    "build": "Checkpoint, engine and model repository of a recipe in one go.",
    "explain": "Cause and remedy for what a log says.",
    "repo": "The model repository of an engine, alone.",
    "serve": "Triton on a model repository.",
    "gateway": "The web gateway alone, in front of running Tritons.",
    "infer": "Stream one answer of a running server.",
    "bench": "Measure a running server under load.",
    "doctor": "What is wrong here, and the remedy.",
    "selftest": "Build and run the bundled model on TensorRT-LLM, and compare.",
}
# What is wrong with a path that a user named; other troubles of the system are failures.
_WRONG_PATH = {
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class _LazyGroup(TyperGroup):
    """Imports the module of the one command that is run; --help needs none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and _load(name), rest


def _load(name: str) -> Any:
    command = import_module(f"trtqwen.cli.{name}").command
    if not isinstance(command, typer.Typer):
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name)(command)
        command = alone
    return typer.main.get_command(command)


app = typer.Typer(
    name="trtqwen",
    cls=_LazyGroup,
    help="From Hugging Face Qwen2.5 weights to a served TensorRT-LLM engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, summary in COMMANDS.items():
    app.command(name, help=summary)(lambda: None)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"trtqwen {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """From Hugging Face Qwen2.5 weights to a served TensorRT-LLM engine."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    # PyTorch's CPU threads otherwise spin while they wait: five times slower where anybody else uses the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # better than to fail where the terminal lacks a character
    try:
        app()
    except TrtQwenError as problem:
        _leave(problem.diagnostic, problem.exit_code)
    except OSError as problem:
        path = f"{problem.filename}: " if problem.filename else ""
        if problem.errno in _WRONG_PATH:
            what = f"{path}cannot be read or written ({problem.strerror})"
            _leave(Diagnostic(what, "correct the path or its permissions"), 2)
        _leave(Diagnostic(f"{path}{problem.strerror or problem}", "check the disk and the system log"), 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(diagnostic: Diagnostic, exit_code: int) -> NoReturn:
    """Print an error and its hint, with `--json` as one object on standard output too, and exit."""
    typer.secho(f"error: {diagnostic.what}", fg="red", bold=True, err=True)
    if diagnostic.hint:
        typer.secho(f"hint: {diagnostic.hint}", fg="cyan", err=True)
    if "--json" in sys.argv:
        with suppress(OSError):  # standard output itself may be what failed
            print_json({"error": diagnostic.as_json()})
    sys.exit(exit_code)

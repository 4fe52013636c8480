"""The command line: parse, call, print. Errors end in one sentence and an exit code (1 failed, 2 bad input)."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trtqwen import __version__
from trtqwen.errors import TrtQwenError

# Each is a module here with a function (or, for a command with subcommands, a Typer) named `command`.
COMMANDS = {
    "demo": "The whole way on this machine, with the bundled model.",
    "convert": "Hugging Face weights to a TensorRT-LLM checkpoint.",
    "verify": "Compare a checkpoint with the model it was made from.",
    "recipe": "List, show and check recipes.",
    "plan": "Memory, concurrency and speed of a recipe, before a GPU is touched.",
    "build": "Checkpoint, engine and model repository of a recipe in one go.",
    "explain": "Cause and remedy for what a log says.",
    "repo": "The model repository of an engine, alone.",
    "serve": "Triton on a model repository.",
    "infer": "Stream one answer of a running server.",
    "doctor": "What is wrong here, and the remedy.",
    "selftest": "Build and run the bundled model on TensorRT-LLM, and compare.",
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
    try:
        app()
    except TrtQwenError as problem:
        typer.secho(f"error: {problem}", fg="red", bold=True, err=True)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)

"""The command line: parse, call, print. Errors end in one sentence and an exit code (1 failed, 2 bad input)."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from trtqwen import __version__
from trtqwen.cli import build, convert, demo, doctor, infer, repo, serve, verify
from trtqwen.cli.output import stderr
from trtqwen.errors import TrtQwenError

app = typer.Typer(
    name="trtqwen",
    help="From Hugging Face Qwen2.5 weights to a served TensorRT-LLM engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (demo, convert, verify, build, repo, serve, infer, doctor):
    app.command(module.__name__.rpartition(".")[2])(module.command)


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
        stderr.print(f"error: {problem}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)

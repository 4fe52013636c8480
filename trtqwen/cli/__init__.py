"""The command line: parse, call, print.

A failure prints an `error:` line and a `hint:` line. The exit code is 1 for a failure and 2 for bad input.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from trtqwen import __version__
from trtqwen.artifact.directory import DISK_FULL
from trtqwen.cli.output import HELP, print_json
from trtqwen.diagnostics import Diagnostic, TrtQwenError

# Each command is a module here with a function named `command`, or a Typer for a command with subcommands.
COMMANDS = {
    "demo": "Run the bundled model end to end, from weights to answers.",
    "convert": "Convert Hugging Face weights to a TensorRT-LLM checkpoint.",
    "export": "Write a TensorRT-LLM checkpoint as a Hugging Face directory.",
    "verify": "Compare a checkpoint with the model that it was made from.",
    "recipe": "List, show, copy and check recipes.",
    "migrate": "Write a recipe for another engine, and list what is lost.",
    "plan": "Estimate memory, concurrency and speed of a recipe. Needs no GPU.",
    "simulate": "Forecast a recipe under load. Needs no GPU.",
    "build": "Build the checkpoint, engine and model repository of a recipe.",
    "image": "List NVIDIA's images, or build one that contains trtqwen.",
    "explain": "Explain the errors in a log.",
    "repo": "Write the model repository of an engine.",
    "serve": "Serve a model repository with Triton and the web gateway.",
    "gateway": "Serve the web gateway alone, in front of running Triton servers.",
    "models": "Change the models of a running gateway.",
    "infer": "Stream one answer from a running server.",
    "batch": "Answer a file of requests without a server.",
    "bench": "Measure a running server under load.",
    "top": "Show the state of a running service in the terminal.",
    "deploy": "Write files for Prometheus, Grafana, compose and Kubernetes.",
    "tune": "Search for the best batching parameters of a workload.",
    "compare": "Compare servers and their answers under the same load.",
    "doctor": "Check this host and what you built for known problems.",
    "selftest": "Run the bundled model on the GPU and compare it with the CPU.",
    "report": "Collect versions, checks and logs in one file, without secrets.",
}
# Errors of the system that mean a wrong path, which is bad input. The others are failures.
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
    """Import the module of the command that runs; --help needs none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and _load(name), rest


def _load(name: str) -> Any:
    command = import_module(f"trtqwen.cli.{name}").command
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by `trtqwen.__main__` for the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not isinstance(command, typer.Typer):
        alone = typer.Typer(add_completion=False, context_settings=HELP, rich_markup_mode=None)
        alone.command(name)(command)
        command = alone
    return typer.main.get_command(command)


app = typer.Typer(
    name="trtqwen",
    cls=_LazyGroup,
    help="Convert Qwen2.5 to TensorRT-LLM, build it, and serve it behind Triton.",
    no_args_is_help=True,
    context_settings=HELP,
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Convert Qwen2.5 to TensorRT-LLM, build it, and serve it behind Triton."""
    from trtqwen.system.leftovers import sweep  # not before a command runs: --help is quick

    sweep()


def main() -> None:
    """Run the command line and exit with its code."""
    # PyTorch's CPU threads spin while they wait by default: five times slower when other processes use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        app()
    except TrtQwenError as problem:
        _leave(problem.diagnostic, problem.exit_code)
    except OSError as problem:
        path = f"{problem.filename}: " if problem.filename else ""
        if problem.errno in DISK_FULL:
            _leave(Diagnostic(f"{path}{problem.strerror}", "free some space, or choose another disk"), 1)
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

"""Output of commands: results on standard output, progress and notes on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from trtqwen.diagnostics import Diagnostic

HELP = {"help_option_names": ["-h", "--help"]}
_TAIL_WIDTH = 60  # characters of a log's line in a bar

stdout = Console()
stderr = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Compare the sizes of files instead of their digests; faster.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")]
InContainer = Annotated[
    bool, typer.Option("--in-container", help="Run in NVIDIA's image of the recipe's release with docker.")
]
ImageName = Annotated[
    str | None, typer.Option("--image", help="Use this image, by tag or digest (with --in-container).")
]
SkipGates = Annotated[
    bool,
    typer.Option("--skip-gates", help="Warn about an unsuitable driver or image and continue (with --in-container)."),
]
Wheels = Annotated[Path | None, typer.Option(help="Install from this directory of wheels (with --in-container).")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the recipe: engine.max_batch_size=32."),
]
ApiKeys = Annotated[Path | None, typer.Option(help="Read the API keys of the gateway from a YAML file.")]
AdminKeys = Annotated[Path | None, typer.Option(help="Read the keys of the gateway's admin routes from a YAML file.")]
ModelsFile = Annotated[Path | None, typer.Option(help="Serve the models of this table, a YAML file.")]
GatewaySettings = Annotated[
    Path | None, typer.Option(help="Read limits, deadlines and other settings of the gateway from a YAML file.")
]
ModelName = Annotated[
    str | None, typer.Option(help="Set the model name that clients use. [default: the name of the repository]")
]


def print_warnings(warnings: Iterable[Diagnostic]) -> None:
    """Print warnings and notes, each with its hint, on standard error."""
    for warning in warnings:
        style = "bold yellow" if warning.level != "note" else None
        level = "note" if warning.level == "note" else "warning"
        stderr.print(f"{level}: {warning.what}", style=style, markup=False, highlight=False, soft_wrap=True)
        if warning.hint:
            stderr.print(f"hint: {warning.hint}", markup=False, highlight=False, soft_wrap=True)


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()  # report a full disk as an error, not at the interpreter's exit


class Bars:
    """Progress bars of a command."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add(self, title: str, total: int, *, unit: str = "bytes") -> Callable[[int], None]:
        """Add a bar with bytes and rate, or with a count of units. Call the result with each progress."""
        task = self._progress.add_task(title, total=total, unit=unit)
        return lambda count: self._progress.advance(task, count)

    def rated(self, title: str, total: int, *, unit: str, what: str) -> Callable[[int, int], None]:
        """Add a bar of `unit` with the rate of `what`. Call the result with both increments."""
        task = self._progress.add_task(title, total=total, unit=unit)
        begun, amount = time.monotonic(), 0

        def show(count: int, more: int) -> None:
            nonlocal amount
            amount += more
            rate = amount / max(time.monotonic() - begun, 1e-3)
            self._progress.update(task, advance=count, description=f"{title} {rate:,.0f} {what}")

        return show

    def noted(self, title: str, total: int, *, unit: str) -> Callable[[str], None]:
        """Add a bar of `unit` that shows a note; call the result with the note of each step."""
        task = self._progress.add_task(title, total=total, unit=unit)
        return lambda note: self._progress.update(task, advance=1, description=f"{title}  {escape(note)}")

    def tail(self, title: str) -> Callable[[str, int, int], None]:
        """Add a bar of counted results with the latest line of a log. Call the result with line, count and total."""
        task = None

        def show(line: str, done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = self._progress.add_task(title, unit="ranks")
            short = line.strip()[-_TAIL_WIDTH:]
            self._progress.update(task, description=f"{title}  {escape(short)}", completed=done, total=total)

        return show


class _Amount(ProgressColumn):
    """Progress of a task in its unit."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn(), TransferSpeedColumn()
        self._count = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        if task.fields["unit"] == "bytes":
            return Text("  ").join(column.render(task) for column in self._bytes)
        return self._count.render(task).append(f" {task.fields['unit']}")


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Show bars on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        yield Bars(progress)


def size(nbytes: int) -> str:
    """Format bytes: `15.2 GB`."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"

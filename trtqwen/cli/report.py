"""`trtqwen report`: collect facts and logs of a host in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import Force, Json, print_json, stdout
from trtqwen.diagnostics import OutputError
from trtqwen.doctor.subject import Subject, completed
from trtqwen.recipe import load_recipe
from trtqwen.report import ReportRequest, write_report
from trtqwen.system.host import read_host


def command(
    recipe: Annotated[str | None, typer.Argument(help="Report on this recipe and what was built from it.")] = None,
    log: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Include this log. Repeat it for more.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Check this Hugging Face model directory too.")] = None,
    engines: Annotated[Path, typer.Option(help="Include build logs and the selftest's result from here.")] = Path(
        "engines"
    ),
    output: Annotated[Path, typer.Option(help="Write this file.")] = Path("trtqwen-report.md"),
    force: Force = False,
    json: Json = False,
) -> None:
    """Write one Markdown file to attach to an issue: versions, doctor, plan, selftest and logs, with causes.

    Text that looks like a secret is removed, and so are the names of the user, the home directory and the host.
    """
    if output.exists() and not force:
        raise OutputError(f"{output}: exists", "pass --force to replace it, or choose another --output")
    subject = completed(Subject(read_host(), recipe=load_recipe(recipe) if recipe else None, model=model))
    write_report(ReportRequest(subject, engines, tuple(log or ())), output)
    if json:
        print_json({"report": str(output)})
    else:
        stdout.print(f"{output}: read it, then attach it", highlight=False, soft_wrap=True)

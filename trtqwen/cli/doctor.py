"""`trtqwen doctor`: check a host and what was built on it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from trtqwen.cli.output import Json, print_json, stderr, stdout
from trtqwen.doctor.run import Finding, examine
from trtqwen.doctor.subject import Subject, completed
from trtqwen.recipe import load_recipe
from trtqwen.system.host import read_host

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def command(
    recipe: Annotated[
        str | None, typer.Argument(help="Check this recipe and what was built from it in engines/ and triton_repo/.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Check this Hugging Face model directory.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Check this TensorRT-LLM checkpoint.")] = None,
    engine: Annotated[Path | None, typer.Option(help="Check this engine directory.")] = None,
    repo: Annotated[
        Path | None, typer.Option(help="Check this Triton model repository, made by trtqwen or not.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Check the Triton server at this gRPC address, host:port.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Read its metrics at host:port. [default: the port after that of --url]")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run an all-reduce on every GPU too.")] = False,
    json: Json = False,
) -> None:
    """Check this host, and the artifacts that you name, for known problems. Exit code 1 if a check fails.

    Without arguments, only the host is checked.
    """
    subject = completed(
        Subject(
            read_host(),
            recipe=load_recipe(recipe) if recipe else None,
            model=model,
            checkpoint=checkpoint,
            engine=engine,
            repository=repo,
            url=url,
            metrics=metrics,
            gpu=gpu,
        )
    )
    with stderr.status("") as status:
        findings = list(examine(subject, lambda check: status.update(f"{check.id} {check.title}")))
    counts = {
        verdict: sum(found.result.verdict == verdict for found in findings)
        for verdict in ("fail", "warn", "ok", "skip")
    }
    if json:
        print_json({"checks": [found.as_json() for found in findings], "counts": counts})
    else:
        _print(findings)
        failed, warned, passed, skipped = counts.values()
        stdout.print(f"{failed} failed, {warned} warned, {passed} ok, {skipped} skipped", highlight=False)
    if counts["fail"]:
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    table = Table("id", "verdict", "what", "evidence and remedy")
    for found in findings:
        check, result = found.check, found.result
        if result.verdict != "skip":
            text = Text(result.evidence)
            if result.hint:
                text.append("\n" + "\n".join(f"-> {line}" for line in result.hint.splitlines()), style="bold")
            table.add_row(check.id, Text(result.verdict, _COLOURS[result.verdict]), check.title, text)
    stdout.print(table)
    skipped = [found for found in findings if found.result.verdict == "skip"]
    skipped.sort(key=lambda found: (found.result.evidence.startswith("give"), found.result.evidence))
    for reason, group in groupby(skipped, key=lambda found: found.result.evidence):
        ids = " ".join(found.check.id for found in group)
        stdout.print(Text(f"skipped {ids}: {reason}", "dim"))

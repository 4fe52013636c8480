"""`trtqwen doctor`: check a host and what was built on it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trtqwen.cli.output import (
    DryRun,
    ImageName,
    Json,
    SkipGates,
    Wheels,
    print_json,
    print_warnings,
    stderr,
    stdout,
)
from trtqwen.containers.commands import plan_doctor_container
from trtqwen.containers.plan import ContainerPlan
from trtqwen.containers.work import ContainerOptions, container_options
from trtqwen.diagnostics import InputError
from trtqwen.doctor.run import Finding, examine, examine_in_container
from trtqwen.doctor.subject import Subject, completed
from trtqwen.recipe import load_recipe
from trtqwen.system.host import read_host

_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


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
    in_container: Annotated[
        bool, typer.Option("--in-container", help="Check inside NVIDIA's image too, with docker.")
    ] = False,
    image: ImageName = None,
    wheels: Wheels = None,
    skip_gates: SkipGates = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Check this host and the artifacts that you name for known problems. Exit code 1 if a check fails.

    Without arguments, check the host only. With --in-container, check docker, disk and GPUs on the host, and
    everything else in the container that the other commands start, with its limits and variables.
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
    if in_container:
        options = container_options(subject.host, image, wheels, skip_gates=skip_gates)
        plan = _container(recipe, subject, options)
        print_warnings(plan.warnings)
        if dry_run:
            if json:
                print_json({"container": plan.command})
            else:
                stdout.print(plan.shell(), markup=False, highlight=False, soft_wrap=True)
            return
        with stderr.status("checking inside of the container"):
            findings = examine_in_container(plan, subject)
    elif dry_run:
        raise InputError(
            "--dry-run has no effect without --in-container", "add --in-container, or leave --dry-run out"
        )
    else:
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


def _container(recipe: str | None, subject: Subject, options: ContainerOptions) -> ContainerPlan:
    named = {
        "model": subject.model,
        "checkpoint": subject.checkpoint,
        "engine": subject.engine,
        "repo": subject.repository,
    }
    directories = {name: path.resolve() for name, path in named.items() if path is not None}
    flags = [f"--{name}={path}" for name, path in directories.items()]
    flags += [f"--{name}={value}" for name, value in (("url", subject.url), ("metrics", subject.metrics)) if value]
    flags += ["--gpu"] if subject.gpu else []
    return plan_doctor_container(recipe, subject.recipe, [*flags, "--json"], list(directories.values()), options)


def _print(findings: list[Finding]) -> None:
    """Print each check with its evidence, and each hint, on lines of their own. Long lines are not cut."""
    for found in findings:
        check, result = found.check, found.result
        if result.verdict == "skip":
            continue
        first, *more = result.evidence.splitlines() or [""]
        line = Text.assemble((f"{result.verdict:<5}", _COLORS[result.verdict]), f"{check.id} {check.title}: {first}")
        for text in (line, *(Text(f"          {evidence}") for evidence in more)):
            stdout.print(text, soft_wrap=True)
        for hint in result.hint.splitlines():
            stdout.print(Text(f"          -> {hint}", "bold"), soft_wrap=True)
    skipped = [found for found in findings if found.result.verdict == "skip"]
    skipped.sort(key=lambda found: (found.result.evidence.startswith("give"), found.result.evidence))
    for reason, group in groupby(skipped, key=lambda found: found.result.evidence):
        ids = " ".join(found.check.id for found in group)
        stdout.print(Text(f"skipped {ids}: {reason}", "dim"), soft_wrap=True)

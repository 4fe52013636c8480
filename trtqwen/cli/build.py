"""`trtqwen build`: make the checkpoint, engine and model repository of a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from trtqwen.artifact.stage import BuildEvents, BuildProgress, StageResult
from trtqwen.build import BuildPlan, check_build, plan_build, run_build
from trtqwen.cli.convert import NoQuality, calibration_bar, quality_inspector, read_quality
from trtqwen.cli.output import (
    Bars,
    Changes,
    DryRun,
    ImageName,
    InContainer,
    Json,
    NoVerify,
    SkipGates,
    Wheels,
    print_json,
    print_warnings,
    progress_bars,
    size,
    stderr,
    stdout,
)
from trtqwen.containers.commands import plan_build_container
from trtqwen.containers.docker import run_container
from trtqwen.containers.plan import ContainerPlan
from trtqwen.containers.work import container_options
from trtqwen.engine.job import Watch
from trtqwen.engine.provenance import read_provenance
from trtqwen.engine.trtllm_builder import BuildFailed, log_tail
from trtqwen.recipe import load_recipe
from trtqwen.system.host import read_host


def command(
    recipe: Annotated[str, typer.Argument(help="Use this recipe: a bundled name, or a YAML file.")],
    model: Annotated[Path, typer.Option(help="Read this Hugging Face model directory.")],
    engines: Annotated[Path, typer.Option(help="Write checkpoint and engine below this directory.")] = Path(
        "engines"
    ),
    repo: Annotated[
        Path | None, typer.Option(help="Write the model repository here. [default: triton_repo/<recipe>]")
    ] = None,
    changes: Changes = None,
    no_quality: NoQuality = False,
    no_verify: NoVerify = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make every stage again, and replace existing files.")
    ] = False,
    dry_run: DryRun = False,
    in_container: InContainer = False,
    image: ImageName = None,
    wheels: Wheels = None,
    skip_gates: SkipGates = False,
    json: Json = False,
) -> None:
    """Build a recipe: convert the model, build the engine, write the model repository.

    Stages that are up to date are not made again.

    With --in-container, the container mounts trtqwen and uses the image's packages. The first start installs missing
    dependencies from the package index and keeps them in ~/.cache/trtqwen. Without a network, pass --wheels with a
    directory that `pip download` filled for Python 3.12. An image of `trtqwen image build` has all dependencies.
    """
    loaded = load_recipe(recipe, changes or ())
    repository = repo or Path("triton_repo") / loaded.name
    container = None
    if in_container:
        flags = [f"--set={change}" for change in changes or ()]
        flags += _flags(no_quality=no_quality, no_verify=no_verify, force=force, json=json)
        options = container_options(read_host(), image, wheels, skip_gates=skip_gates)
        container = plan_build_container(recipe, loaded, model, engines, repository, flags, options)
        print_warnings(container.warnings)
        if not dry_run:
            run_container(container)
    plan = plan_build(loaded, model, engines, repository)
    print_warnings(plan.conversion.findings)
    if dry_run:
        check_build(plan, force=force)
        _print_plan(plan, container, verify=not no_verify, json=json)
        return
    try:
        with progress_bars() as bars:
            events = BuildEvents(
                written=bars.add("converting", plan.conversion.nbytes),
                calibrated=calibration_bar(bars, plan.conversion),
                inspect=quality_inspector(bars, wanted=not no_quality),
                built=_watch(bars),
                on_busy=lambda pid: stderr.print(f"waiting for another build (pid {pid})", highlight=False),
                on_stage=lambda result: _note(result, json),
            )
            results = run_build(plan, force=force, verify=not no_verify, events=events)
    except BuildFailed as problem:
        for line in log_tail(problem.log):
            stderr.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
        raise
    record = read_provenance(plan.engine.directory)
    made = record.changes if record else []
    if json:
        content = {
            "recipe": loaded.name,
            "stages": [_as_json(result) for result in results],
            "warnings": [finding.as_json() for finding in plan.conversion.findings],
        }
        print_json(content | {"changed_by_builder": [change.model_dump() for change in made]})
    else:
        quality = read_quality(plan.checkpoint.directory)
        if quality and quality["not_measured"]:
            why = quality["not_measured"]
            stderr.print(f"quality report: not measured, {why}", style="yellow", markup=False, highlight=False)
        for change in made:
            stdout.print(f"trtllm-build changed {change}", style="yellow", markup=False, highlight=False)
        stdout.print(f"ready: trtqwen serve --repo {plan.repository.directory}", highlight=False)


def _watch(bars: Bars) -> Watch:
    """Show a bar of the ranks with the latest line of the log on a terminal, and a note per rank elsewhere."""
    show, told = bars.tail("building"), 0

    def on_progress(progress: BuildProgress) -> None:
        nonlocal told
        show(progress.line, progress.ranks_done, progress.ranks)
        if not stderr.is_terminal and progress.ranks_done > told:
            told = progress.ranks_done
            stderr.print(f"engine: {told} of {progress.ranks} ranks built", highlight=False)

    return on_progress


def _flags(**given: bool) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name, value in given.items() if value]


def _print_plan(plan: BuildPlan, container: ContainerPlan | None, *, verify: bool, json: bool) -> None:
    if json:
        stages = [
            {"stage": stage.name, "directory": str(stage.directory), "key": stage.key(), "up_to_date": why is None}
            | {"why": why}
            for stage, why in ((stage, stage.why(digests=verify)) for stage in plan.stages)
        ]
        content = {"recipe": plan.recipe.name, "stages": stages, "engine_command": plan.engine_command}
        print_json(content | {"container": container and container.command})
        return
    for stage in plan.stages:
        why = stage.why(digests=verify)
        todo = f"would be made, because {why}" if why else "up to date"
        stdout.print(f"{stage.name:<10} {stage.directory}: {todo}", markup=False, highlight=False, soft_wrap=True)
    if plan.engine_command:
        stdout.print(shlex.join(plan.engine_command), markup=False, highlight=False, soft_wrap=True)
    if container:
        stdout.print(container.shell(), markup=False, highlight=False, soft_wrap=True)


def _note(result: StageResult, json: bool) -> None:
    why = result.why
    what = f"{size(result.nbytes)} in {result.seconds:.1f} s, because {why}" if why else "up to date"
    (stderr if json else stdout).print(
        f"{result.stage:<10} {result.directory}: {what}", markup=False, highlight=False, soft_wrap=True
    )


def _as_json(result: StageResult) -> dict[str, object]:
    return {
        "stage": result.stage,
        "directory": str(result.directory),
        "reused": result.reused,
        "why": result.why,
        "seconds": round(result.seconds, 3),
        "bytes": result.nbytes,
    }

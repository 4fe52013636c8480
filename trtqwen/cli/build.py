"""`trtqwen build`: checkpoint, engine and model repository of a recipe in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trtqwen.build import BuildPlan, StageResult, plan_build, run_build
from trtqwen.cli.convert import NoQuality, calibration_bar, quality_inspector
from trtqwen.cli.output import DryRun, Force, Json, print_json, progress_bars, size, stderr, stdout
from trtqwen.recipe import load_recipe


def command(
    recipe: Annotated[str, typer.Argument(help="Name of a bundled recipe, or a YAML file.")],
    model: Annotated[Path, typer.Option(help="Hugging Face model directory.")],
    engines: Annotated[Path, typer.Option(help="Parent of the checkpoint and engine directories.")] = Path("engines"),
    repo: Annotated[
        Path | None, typer.Option(help="Model repository to write. [default: triton_repo/<recipe>]")
    ] = None,
    no_quality: NoQuality = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Build a recipe: convert, build the engine, write the model repository. What is up to date is kept."""
    loaded = load_recipe(recipe)
    plan = plan_build(loaded, model, engines, repo or Path("triton_repo") / loaded.name)
    if dry_run:
        _print_plan(plan, json)
        return
    with progress_bars() as bars:
        results = run_build(
            plan,
            force=force,
            calibrated=calibration_bar(bars, plan.conversion),
            progress=bars.add("converting", plan.conversion.nbytes),
            inspect=quality_inspector(bars, wanted=not no_quality),
            on_stage=lambda result: _note(result, json),
        )
    if json:
        print_json({"recipe": loaded.name, "stages": [_as_json(result) for result in results]})
    else:
        stdout.print(f"ready: trtqwen serve --repo {plan.repository.directory}", highlight=False)


def _print_plan(plan: BuildPlan, json: bool) -> None:
    stages = [
        {"stage": stage.stage, "directory": str(stage.directory), "key": stage.key, "up_to_date": stage.done}
        for stage in plan.stages
    ]
    if json:
        print_json({"recipe": plan.recipe.name, "stages": stages})
        return
    table = Table("stage", "directory", "to do")
    for stage in stages:
        table.add_row(str(stage["stage"]), str(stage["directory"]), "nothing" if stage["up_to_date"] else "make")
    stdout.print(table)


def _note(result: StageResult, json: bool) -> None:
    what = "up to date" if result.reused else f"{size(result.nbytes)} in {result.seconds:.1f} s"
    (stderr if json else stdout).print(f"{result.stage:<10} {result.directory}: {what}", highlight=False)


def _as_json(result: StageResult) -> dict[str, object]:
    return {
        "stage": result.stage,
        "directory": str(result.directory),
        "reused": result.reused,
        "seconds": round(result.seconds, 3),
        "bytes": result.nbytes,
    }

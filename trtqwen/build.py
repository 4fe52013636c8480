"""The whole build of a recipe: checkpoint, engine and model repository, each taken from before if nothing changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trtqwen.artifact import Manifest, Stage, cached, check_output
from trtqwen.checkpoint.convert import ConversionPlan, Inspect, Progress, plan_conversion, run_conversion
from trtqwen.engine.builder import build_engine, engine_key
from trtqwen.errors import OutputError
from trtqwen.recipe import Recipe
from trtqwen.triton.repository import repository_key, write_repository


@dataclass(frozen=True)
class StagePlan:
    """One stage of a build: where its result goes and the manifest key it will have."""

    stage: Stage
    directory: Path
    key: str

    @property
    def done(self) -> bool:
        """Whether the directory already holds this very result."""
        return cached(self.directory, self.stage, self.key)


@dataclass(frozen=True)
class BuildPlan:
    """A build with all its stages, in order."""

    recipe: Recipe
    conversion: ConversionPlan
    checkpoint: StagePlan
    engine: StagePlan
    repository: StagePlan

    @property
    def stages(self) -> tuple[StagePlan, StagePlan, StagePlan]:
        return self.checkpoint, self.engine, self.repository


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        reused: whether an earlier result was taken as it is.
        seconds: time it took.
        nbytes: size of its directory.
    """

    stage: Stage
    directory: Path
    reused: bool
    seconds: float
    nbytes: int


def plan_build(recipe: Recipe, model: Path, engines: Path, repository: Path) -> BuildPlan:
    """Check the source and work out every stage's key; reads the source's bytes to take its digests.

    Args:
        engines: parent of the directories that are named after recipes.
        repository: where the model repository goes.
    """
    conversion = plan_conversion(model, recipe.checkpoint)
    checkpoint_key = conversion.key()
    built_key = engine_key(checkpoint_key, recipe.engine)
    home = engines / recipe.name
    return BuildPlan(
        recipe,
        conversion,
        StagePlan("checkpoint", home / "checkpoint", checkpoint_key),
        StagePlan("engine", home / "engine", built_key),
        StagePlan("repository", repository, repository_key(home / "engine", built_key, recipe.serve)),
    )


def run_build(
    plan: BuildPlan,
    *,
    force: bool = False,
    progress: Progress = lambda count: None,
    calibrated: Progress = lambda layers: None,
    inspect: Inspect = lambda plan, directory, ranges: None,
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> list[StageResult]:
    """Carry out what is not done yet.

    Args:
        force: replace directories that hold another result.
        progress: called with the bytes of checkpoint written since the last call.
        calibrated: called with the number of layers calibrated since the last call.
        inspect: called with the checkpoint's directory before its manifest is written.
        on_stage: called when a stage is complete.

    Raises:
        OutputError: before anything is written, if a stage's directory holds another result and `force` is not set.
        EngineError: after the checkpoint is written, if the engine's builder is not on this machine.
    """
    for stage in plan.stages:
        if not stage.done:
            _refuse_other_result(stage, force)
    actions: list[tuple[StagePlan, Callable[[], Manifest]]] = [
        (
            plan.checkpoint,
            lambda: run_conversion(
                plan.conversion,
                plan.checkpoint.directory,
                force=force,
                progress=progress,
                calibrated=calibrated,
                inspect=inspect,
            ),
        ),
        (
            plan.engine,
            lambda: build_engine(plan.checkpoint.directory, plan.recipe.engine, plan.engine.directory, force=force),
        ),
        (
            plan.repository,
            lambda: write_repository(
                plan.engine.directory, plan.recipe.serve, plan.repository.directory, force=force
            ),
        ),
    ]
    results = []
    for stage, action in actions:
        results.append(_run_stage(stage, action))
        on_stage(results[-1])
    return results


def _run_stage(stage: StagePlan, action: Callable[[], Manifest]) -> StageResult:
    start = time.perf_counter()
    reused = stage.done
    if not reused:
        action()
    nbytes = sum(path.stat().st_size for path in stage.directory.rglob("*") if path.is_file())
    return StageResult(stage.stage, stage.directory, reused, time.perf_counter() - start, nbytes)


def _refuse_other_result(stage: StagePlan, force: bool) -> None:
    try:
        check_output(stage.directory, force=force)
    except OutputError:
        raise OutputError(
            f"{stage.directory}: holds another {stage.stage} (other model, recipe or version); "
            "pass --force to replace it"
        ) from None

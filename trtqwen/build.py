"""The whole build of a recipe: checkpoint, engine and model repository. Unchanged stages are reused."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trtqwen.artifact.directory import check_place, clear_leftovers, destination, locked
from trtqwen.artifact.manifest import MANIFEST, Manifest, StageName, load_manifest
from trtqwen.artifact.stage import BuildEvents, Stage, StageResult, occupied
from trtqwen.checkpoint.convert import CheckpointStage, ConversionPlan, check_kv_cache, plan_conversion
from trtqwen.diagnostics import InputError, OutputError, SourceError
from trtqwen.engine.builder import EngineStage
from trtqwen.engine.flags import build_command
from trtqwen.engine.gates import check_release
from trtqwen.engine.limits import check_computed, check_context
from trtqwen.recipe import Recipe
from trtqwen.system.host import read_host
from trtqwen.triton.repository import RepositoryStage


@dataclass(frozen=True)
class BuildPlan:
    """A build with all its stages, in order."""

    recipe: Recipe
    checkpoint: CheckpointStage
    engine: EngineStage
    repository: RepositoryStage

    @property
    def conversion(self) -> ConversionPlan:
        return self.checkpoint.plan

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.checkpoint, self.engine, self.repository

    @property
    def engine_command(self) -> list[str] | None:
        """Return the trtllm-build command of the engine; None if trtqwen builds the engine itself."""
        if self.recipe.engine.backend != "tensorrt_llm":
            return None
        return build_command(self.recipe, self.checkpoint.directory, self.engine.directory)


def plan_build(recipe: Recipe, model: Path, engines: Path, repository: Path) -> BuildPlan:
    """Check the source and compute every stage's key. Reads the whole source for its digests.

    Args:
        engines: parent of the directories that are named after recipes.
        repository: where the model repository goes.

    Raises:
        SourceError, CheckpointError, InputError: if the model cannot be converted, built or served as asked.
        OutputError: if one of the directories contains the model or another one of them.
    """
    home, repository = engines / recipe.name, destination(repository)
    places = home / "checkpoint", home / "engine", repository
    for place in places:
        check_place(place, [model, *(other for other in places if other is not place)])
    conversion = plan_checkpoint(recipe, model)
    checkpoint = CheckpointStage(conversion, home / "checkpoint")
    engine = plan_engine(recipe, checkpoint, home / "engine")
    return BuildPlan(
        recipe, checkpoint, engine, RepositoryStage(engine.directory, engine.key(), recipe.serve, repository)
    )


def plan_checkpoint(recipe: Recipe, model: Path) -> ConversionPlan:
    """Plan the conversion, and check that the recipe's engine can serve its result.

    Raises:
        SourceError, CheckpointError, InputError: if the model cannot be converted or served as asked.
    """
    conversion = plan_conversion(model, recipe.checkpoint)
    check_context(recipe, conversion.source.config)
    check_computed(recipe.engine.backend, conversion.source.config)
    return conversion


def plan_engine(recipe: Recipe, checkpoint: CheckpointStage, directory: Path) -> EngineStage:
    """The stage that builds the recipe's engine from a checkpoint."""
    return EngineStage(
        checkpoint.directory,
        checkpoint.key(),
        recipe.engine,
        directory,
        serve=recipe.serve,
        card=recipe.host.card if recipe.host else None,
    )


def run_build(
    plan: BuildPlan, *, force: bool = False, verify: bool = True, events: BuildEvents | None = None
) -> list[StageResult]:
    """Make the stages that are not up to date. Waits for another build in the same directories.

    Args:
        force: make every stage, and replace what `check_build` protects.
        verify: read every file of an earlier result and compare its digest; otherwise only sizes are compared.

    Raises:
        OutputError, InputError: before anything is written, from `check_build`.
        EngineError: after the checkpoint is written, if the engine cannot be built on this machine or fails to.
    """
    events = events or BuildEvents()
    home, repository = plan.engine.directory.parent, plan.repository.directory
    results = []
    with ExitStack() as locks:
        for place in (home, repository):
            locks.enter_context(locked(place.with_name(f".{place.name}.build"), events.on_busy))
        for stage in plan.stages:
            clear_leftovers(stage.directory)
        check_build(plan, force=force)
        for stage in plan.stages:
            results.append(_run_stage(stage, events, force=force, verify=verify))
            events.on_stage(results[-1])
    return results


def check_build(plan: BuildPlan, *, force: bool) -> None:
    """Refuse to replace files that no build of this model made, unless `force` is set, and builds that will fail.

    Raises:
        OutputError: if a stage's directory holds other files, or the checkpoint or engine of another model.
        InputError: if an INT8 KV cache would damage the answers and `force` is not set, or the model has no
            tokenizer, which the repository needs.
        EngineError: if the TensorRT-LLM of this machine is not the recipe's.
    """
    if plan.recipe.engine.backend == "tensorrt_llm" and not plan.engine.done:
        check_release(read_host(), plan.recipe.checkpoint.release)
    made: dict[StageName, Manifest] = {}
    for stage in plan.stages:
        if not force and occupied(stage.directory):
            try:
                made[stage.name] = load_manifest(stage.directory, stage.name)
            except InputError as problem:
                foreign = f"{stage.directory}: holds files that are not a finished {stage.name}"
                what = problem.what if (stage.directory / MANIFEST).is_file() else foreign
                raise OutputError(what, "pass --force to replace it or choose another directory") from None
    if (checkpoint := made.get("checkpoint")) is not None:
        old, new = _weights(checkpoint.inputs), _weights(plan.checkpoint.inputs())
        if old != new:
            changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            raise OutputError(
                (
                    f"{plan.checkpoint.directory}: holds the checkpoint of another model ({changed[0]} "
                    f"differs from {plan.conversion.source.directory}'s)"
                ),
                "pass --force to replace it and its engine, or choose another --engines directory",
            )
    elif (engine := made.get("engine")) is not None and engine.inputs.get("checkpoint") != plan.checkpoint.key():
        raise OutputError(
            (f"{plan.engine.directory}: holds an engine whose checkpoint is gone, perhaps one of another model"),
            "pass --force to replace it or choose another --engines directory",
        )
    if not plan.checkpoint.done:
        check_kv_cache(plan.conversion, force=force)
        if plan.conversion.tokenizer is None:
            raise SourceError(
                f"{plan.conversion.source.directory}: has no tokenizer.json, which the model repository needs",
                "copy the model's tokenizer files there",
            )


def _run_stage(stage: Stage, events: BuildEvents, *, force: bool, verify: bool) -> StageResult:
    start = time.perf_counter()
    why = stage.why(digests=verify) or ("--force was given" if force else None)
    if why is not None:
        stage.check(force=True)  # what may not be replaced was refused by `check_build`
        stage.make(force=True, events=events)
    nbytes = sum(path.stat().st_size for path in stage.directory.rglob("*") if path.is_file())
    return StageResult(stage.name, stage.directory, why, time.perf_counter() - start, nbytes)


def _weights(inputs: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in inputs.items() if name.endswith(".safetensors")}

"""The whole build of a recipe: checkpoint, engine and model repository, each taken from before if nothing changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtqwen import __version__
from trtqwen.artifact import (
    Manifest,
    Stage,
    cached,
    check_place,
    damage,
    destination,
    load_manifest,
    locked,
    recover,
)
from trtqwen.checkpoint.convert import (
    ConversionPlan,
    Inspect,
    Progress,
    check_kv_cache,
    plan_conversion,
    run_conversion,
)
from trtqwen.diagnostics import InputError, OutputError, SourceError
from trtqwen.engine.builder import build_engine, engine_key, engine_parameters
from trtqwen.engine.flags import build_command
from trtqwen.engine.gates import check_release
from trtqwen.engine.job import Watch
from trtqwen.engine.limits import check_computed, check_context
from trtqwen.recipe import Recipe
from trtqwen.system.host import read_host
from trtqwen.triton.repository import repository_key, write_repository

_SECTIONS: dict[Stage, str] = {"checkpoint": "checkpoint", "engine": "engine", "repository": "serve"}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a build: where its result goes and the manifest key it will have.

    Attributes:
        inputs: digests of what it is made of, as far as they are to be named when they change.
        parameters: its section of the recipe.
    """

    stage: Stage
    directory: Path
    key: str
    inputs: dict[str, str]
    parameters: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether the directory already holds this very result."""
        return cached(self.directory, self.stage, self.key)

    def why(self) -> str | None:
        """Why it has to be made, in words that follow "because"; None if it is done."""
        if not _occupied(self.directory):
            return "it is not there"
        try:
            manifest = load_manifest(self.directory, self.stage)
        except InputError:
            return "other files are in its place"
        if manifest.key == self.key:
            return damage(self.directory, manifest)
        return " and ".join(self._changes(manifest)[:3]) or "what it was made with changed"

    def _changes(self, made: Manifest) -> list[str]:
        if made.tool_version != __version__:
            return [f"trtqwen changed from {made.tool_version} to {__version__}"]
        section, article = _SECTIONS[self.stage], "" if self.stage == "checkpoint" else "the "
        settings = [
            f"{section}.{name} changed from {_word(made.parameters[name])} to {_word(value)}"
            for name, value in self.parameters.items()
            if name in made.parameters and made.parameters[name] != value
        ]
        inputs = [
            f"{article}{name} changed" for name, digest in self.inputs.items() if made.inputs.get(name) != digest
        ]
        return settings + inputs


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

    @property
    def engine_command(self) -> list[str] | None:
        """The trtllm-build call that makes the engine; None if trtqwen makes it itself."""
        if self.recipe.engine.backend == "torch":
            return None
        return build_command(self.recipe, self.checkpoint.directory, self.engine.directory)


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        why: why it was made; None if an earlier result was taken as it is.
        seconds: time it took.
        nbytes: size of its directory.
    """

    stage: Stage
    directory: Path
    why: str | None
    seconds: float
    nbytes: int

    @property
    def reused(self) -> bool:
        return self.why is None


def plan_build(recipe: Recipe, model: Path, engines: Path, repository: Path) -> BuildPlan:
    """Check the source and work out every stage's key; reads the source's bytes to take its digests.

    Args:
        engines: parent of the directories that are named after recipes.
        repository: where the model repository goes.

    Raises:
        SourceError, CheckpointError, InputError: if the model cannot be converted, built or served as asked.
        OutputError: if one of the directories lies around the model or another of them.
    """
    home, repository = engines / recipe.name, destination(repository)
    places = home / "checkpoint", home / "engine", repository
    for place in places:
        check_place(place, [model, *(other for other in places if other is not place)])
    conversion = plan_conversion(model, recipe.checkpoint)
    check_context(recipe, conversion.source.config)
    check_computed(recipe.engine.backend, conversion.source.config)
    checkpoint_key = conversion.key()
    built_key = engine_key(checkpoint_key, recipe.engine)
    engine = home / "engine"
    return BuildPlan(
        recipe,
        conversion,
        StagePlan("checkpoint", home / "checkpoint", checkpoint_key, conversion.inputs(), conversion.parameters),
        StagePlan("engine", engine, built_key, {"checkpoint": checkpoint_key}, engine_parameters(recipe.engine)),
        StagePlan(
            "repository",
            repository,
            repository_key(engine, built_key, recipe.serve),
            {"engine": built_key},
            recipe.serve.model_dump(),
        ),
    )


def run_build(
    plan: BuildPlan,
    *,
    force: bool = False,
    progress: Progress = lambda count: None,
    calibrated: Progress = lambda layers: None,
    inspect: Inspect = lambda plan, directory, ranges: None,
    watch: Watch = lambda progress: None,
    on_busy: Callable[[int], None] = lambda pid: None,
    on_stage: Callable[[StageResult], None] = lambda result: None,
) -> list[StageResult]:
    """Carry out what is not done yet. Waits while another build works in the same directories.

    Args:
        force: replace what `check_build` protects.
        progress: called with the bytes of checkpoint written since the last call.
        calibrated: called with the number of layers calibrated since the last call.
        inspect: called with the checkpoint's directory before its manifest is written.
        watch: called with every line that trtllm-build prints.
        on_busy: called with the id of a process that has to be waited for.
        on_stage: called when a stage is complete.

    Raises:
        OutputError, InputError: before anything is written, from `check_build`.
        EngineError: after the checkpoint is written, if the engine cannot be built on this machine or fails to.
    """
    home = plan.engine.directory.parent
    results = []

    def run(stage: StagePlan, action: Callable[[], Manifest]) -> None:
        results.append(_run_stage(stage, action))
        on_stage(results[-1])

    with locked(home.with_name(f".{home.name}.build"), on_busy):
        for stage in plan.stages:
            recover(stage.directory)
        check_build(plan, force=force)
        # From here on force is set: what may not be replaced was refused above.
        run(
            plan.checkpoint,
            lambda: run_conversion(
                plan.conversion,
                plan.checkpoint.directory,
                force=True,
                progress=progress,
                calibrated=calibrated,
                inspect=inspect,
            ),
        )
        engine, repository = plan.engine.directory, plan.repository.directory
        run(
            plan.engine,
            lambda: build_engine(
                plan.checkpoint.directory,
                plan.recipe.engine,
                engine,
                force=True,
                serve=plan.recipe.serve,
                card=plan.recipe.host.card if plan.recipe.host else None,
                watch=watch,
            ),
        )
        with locked(repository.with_name(f".{repository.name}.build"), on_busy):
            run(plan.repository, lambda: write_repository(engine, plan.recipe.serve, repository, force=True))
    return results


def check_build(plan: BuildPlan, *, force: bool) -> None:
    """Refuse to replace what a build of this model has not made, unless `force` is set; and to convert in vain.

    Raises:
        OutputError: if a stage's directory holds other files, or the checkpoint or engine of another model.
        InputError: if an INT8 KV cache would ruin the answers and `force` is not set, or the model has no tokenizer,
            which the repository needs.
        EngineError: if the TensorRT-LLM of this machine is not the recipe's.
    """
    if plan.recipe.engine.backend == "tensorrt_llm" and not plan.engine.done:
        check_release(read_host(), plan.recipe.checkpoint.release)
    made: dict[Stage, Manifest] = {}
    for stage in plan.stages:
        if not force and _occupied(stage.directory):
            try:
                made[stage.stage] = load_manifest(stage.directory, stage.stage)
            except InputError:
                raise OutputError(
                    f"{stage.directory}: holds files that are not a finished {stage.stage}",
                    "pass --force to replace them or choose another directory",
                ) from None
    if (checkpoint := made.get("checkpoint")) is not None:
        old, new = _weights(checkpoint.inputs), _weights(plan.checkpoint.inputs)
        if old != new:
            changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            raise OutputError(
                (
                    f"{plan.checkpoint.directory}: holds the checkpoint of another model ({changed[0]} "
                    f"differs from {plan.conversion.source.directory}'s)"
                ),
                "pass --force to replace it and its engine, or choose another --engines directory",
            )
    elif (engine := made.get("engine")) is not None and engine.inputs.get("checkpoint") != plan.checkpoint.key:
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


def _run_stage(stage: StagePlan, action: Callable[[], Manifest]) -> StageResult:
    start = time.perf_counter()
    why = stage.why()
    if why is not None:
        action()
    nbytes = sum(path.stat().st_size for path in stage.directory.rglob("*") if path.is_file())
    return StageResult(stage.stage, stage.directory, why, time.perf_counter() - start, nbytes)


def _occupied(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _weights(inputs: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in inputs.items() if name.endswith(".safetensors")}


def _word(value: Any) -> str:
    """A value as YAML has it: `null`, `true`, `int8_sq`."""
    return value if isinstance(value, str) else json.dumps(value)

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import random_model
from tests.processes import fork, in_child
from tests.standins.host import install
from trtqwen import __version__
from trtqwen.artifact.manifest import read_manifest
from trtqwen.artifact.stage import BuildEvents, StageResult
from trtqwen.build import BuildPlan, plan_build, run_build
from trtqwen.checkpoint.convert import run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import EngineError, InputError, OutputError, SourceError
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, Recipe, load_recipe
from trtqwen.triton.integrity import check_served_files

TINY = load_recipe("qwen2-tiny-cpu")


def build(home: Path, recipe: Recipe = TINY, model: Path = MODEL, *, force: bool = False) -> list[StageResult]:
    return run_build(plan_build(recipe, model, home / "engines", home / "repo"), force=force)


def plan(home: Path) -> BuildPlan:
    return plan_build(TINY, MODEL, home / "engines", home / "repo")


def with_settings(recipe: Recipe, section: str, **settings: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=settings)})


def other_model(home: Path) -> Path:
    """The bundled model with one bit changed."""
    shutil.copytree(MODEL, home / "other")
    weights = home / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return home / "other"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def whys(results: list[StageResult]) -> list[str | None]:
    return [result.why for result in results]


def reused(results: list[StageResult]) -> list[bool]:
    return [result.reused for result in results]


def test_the_stages_are_made_once_and_then_kept(tmp_path: Path) -> None:
    first = build(tmp_path)
    assert [result.stage for result in first] == ["checkpoint", "engine", "repository"]
    assert reused(first) == [False, False, False]
    assert reused(build(tmp_path)) == [True, True, True]


def test_what_changes_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    build(tmp_path)
    changed = with_settings(TINY, "serve", max_queue_size=7)
    assert whys(build(tmp_path, changed)) == [None, None, "serve.max_queue_size changed from 256 to 7"]
    changed = with_settings(changed, "engine", max_batch_size=3)
    assert whys(build(tmp_path, changed)) == [
        None,
        "engine.max_batch_size changed from 16 to 3",
        "the engine changed",
    ]
    changed = with_settings(changed, "checkpoint", dtype="bfloat16", tp_size=1)
    assert whys(build(tmp_path, changed)) == [
        "checkpoint.dtype changed from float32 to bfloat16 and checkpoint.tp_size changed from 2 to 1",
        "the checkpoint changed",
        "the engine changed",
    ]
    assert reused(build(tmp_path, changed)) == [True, True, True]


def test_what_does_not_decide_the_result_changes_nothing(tmp_path: Path) -> None:
    build(tmp_path)
    assert reused(build(tmp_path, TINY.model_copy(update={"description": "other", "model": None}))) == [True] * 3


def test_another_tokenizer_is_not_another_model(tmp_path: Path) -> None:
    build(tmp_path)
    shutil.copytree(MODEL, tmp_path / "other")
    with (tmp_path / "other" / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert whys(build(tmp_path, model=tmp_path / "other"))[0] == "tokenizer_config.json changed"


def test_another_version_makes_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    monkeypatch.setattr("trtqwen.artifact.manifest.__version__", "9.9")
    monkeypatch.setattr("trtqwen.artifact.stage.__version__", "9.9")
    assert whys(build(tmp_path)) == [f"trtqwen changed from {__version__} to 9.9"] * 3


def test_another_model_is_not_replaced_unless_forced(tmp_path: Path) -> None:
    build(tmp_path)
    model = other_model(tmp_path)
    before = read_manifest(tmp_path / "repo", "repository")
    with pytest.raises(OutputError, match=r"checkpoint of another model \(model.safetensors differs.*--force"):
        build(tmp_path, model=model)
    assert read_manifest(tmp_path / "repo", "repository") == before
    shutil.rmtree(tmp_path / "engines" / TINY.name / "checkpoint")
    with pytest.raises(OutputError, match=r"engine whose checkpoint is gone.*--force"):
        build(tmp_path, model=model)
    assert reused(build(tmp_path, model=model, force=True)) == [False, False, False]


@pytest.mark.parametrize("place", ["engines/qwen2-tiny-cpu/checkpoint", "engines/qwen2-tiny-cpu/engine", "repo"])
def test_foreign_files_are_not_replaced_unless_forced(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "thesis.tex").touch()
    with pytest.raises(OutputError, match=f"{place}: holds files that are not a finished .*--force"):
        build(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thesis.tex"]
    build(tmp_path, force=True)
    assert not (tmp_path / place / "thesis.tex").exists()


def test_replacing_does_not_mean_putting_up_with_a_spoiled_int8_kv_cache(tmp_path: Path) -> None:
    model = random_model(num_hidden_layers=6)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.mul_(40)
    model.save_pretrained(tmp_path / "hf")
    engine = EngineRecipe(backend="torch", max_seq_len=64, max_num_tokens=64)
    recipe = Recipe(name="spiked", description="d", engine=engine, checkpoint=CheckpointRecipe())
    plan = plan_build(recipe, tmp_path / "hf", tmp_path, tmp_path / "repo")
    run_conversion(plan.conversion, plan.checkpoint.directory)
    int8 = with_settings(recipe, "checkpoint", kv_cache="int8")
    with pytest.raises(InputError, match="INT8 KV cache"):
        run_build(plan_build(int8, tmp_path / "hf", tmp_path, tmp_path / "repo"))
    assert plan.checkpoint.done


def test_a_damaged_stage_is_not_taken_as_done(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "engines" / TINY.name / "engine" / "rank1.safetensors").unlink()
    assert whys(build(tmp_path)) == [None, "rank1.safetensors is missing", None]


def die(*anything: object, **named: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patched(name: str) -> Callable[[Path], object]:
    """A build that dies when it calls what `name` names."""

    def build_and_die(home: Path) -> None:
        pytest.MonkeyPatch().setattr(name, die)
        build(home)

    return build_and_die


def after(stage: str) -> Callable[[Path], object]:
    """A build that dies when a stage is complete."""
    return lambda home: run_build(
        plan(home), events=BuildEvents(on_stage=lambda result: die() if result.stage == stage else None)
    )


@pytest.mark.parametrize(
    ("killed", "kept"),
    [
        (lambda home: run_build(plan(home), events=BuildEvents(written=die)), 0),
        (lambda home: run_build(plan(home), events=BuildEvents(inspect=die)), 0),
        (patched("trtqwen.artifact.directory._sync_tree"), 0),
        (after("checkpoint"), 1),
        (patched("os.link"), 1),
        (after("engine"), 2),
        (patched("trtqwen.triton.repository.config_text"), 2),
        (after("repository"), 3),
    ],
    ids=["weights", "report", "sync", "checkpoint done", "engine", "engine done", "repository", "repository done"],
)
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, killed: Callable[[Path], object], kept: int) -> None:
    assert in_child(lambda: killed(tmp_path)) == -signal.SIGKILL
    assert reused(build(tmp_path)) == [index < kept for index in range(3)]
    assert names(tmp_path / "engines" / TINY.name) == {"checkpoint", "engine"}
    assert names(tmp_path) == {"engines", "repo"}


def test_a_build_killed_while_it_replaces_goes_on_too(tmp_path: Path) -> None:
    build(tmp_path, with_settings(TINY, "checkpoint", dtype="bfloat16"))
    assert in_child(lambda: patched("trtqwen.artifact.directory._sync_tree")(tmp_path)) == -signal.SIGKILL
    assert in_child(lambda: patched("os.link")(tmp_path)) == -signal.SIGKILL
    assert whys(build(tmp_path)) == [None, "the checkpoint changed", "the engine changed"]
    assert names(tmp_path / "engines" / TINY.name) == {"checkpoint", "engine"}


def test_killed_at_any_moment_a_build_ends_up_the_same(tmp_path: Path) -> None:
    build(tmp_path / "whole")
    for attempt in range(8):
        child = fork(lambda: build(tmp_path / "killed"))
        time.sleep(0.02 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    build(tmp_path / "killed")
    assert reused(build(tmp_path / "killed")) == [True, True, True]
    checkpoints = [
        read_manifest(tmp_path / home / "engines" / TINY.name / "checkpoint", "checkpoint")
        for home in ("whole", "killed")
    ]
    assert checkpoints[0] == checkpoints[1]


def test_of_builds_at_the_same_time_one_builds_and_the_others_wait_for_it(tmp_path: Path) -> None:
    def work() -> None:
        waited: list[int] = []
        results = run_build(plan(tmp_path), events=BuildEvents(on_busy=waited.append))
        assert len(waited) <= 2
        (tmp_path / f"{os.getpid()}.txt").write_text("".join("-" if result.reused else "B" for result in results))

    children = [fork(work) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert sorted(path.read_text() for path in tmp_path.glob("*.txt")) == ["---", "---", "BBB"]


def test_without_trtllm_build_the_checkpoint_is_written_all_the_same(tmp_path: Path) -> None:
    engine = TINY.engine.model_copy(update={"backend": "tensorrt_llm"})
    with pytest.raises(EngineError, match="trtllm-build is not on this machine: the checkpoint is written"):
        build(tmp_path, TINY.model_copy(update={"engine": engine}))
    assert read_manifest(tmp_path / "engines" / TINY.name / "checkpoint", "checkpoint")
    assert not (tmp_path / "repo").exists()


def test_another_release_is_refused_before_the_weights_are_converted_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "host", monkeypatch, tensorrt_llm="1.0.0", tensorrt="10.11.0.33")
    recipe = load_recipe("qwen2.5-7b-bf16-tp4-4090d")
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"max_seq_len": 2048})})
    with pytest.raises(EngineError, match=r"TensorRT-LLM 1\.0\.0 is installed, but .* checkpoint\.release 1\.2\.1"):
        run_build(plan_build(recipe, MODEL, tmp_path / "engines", tmp_path / "repository"))
    assert not (tmp_path / "engines" / recipe.name).exists()


def flip(path: Path, position: int) -> None:
    """Change one bit of a file, and of no other that shares its bytes."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_one_changed_bit_anywhere_is_noticed_and_repaired(tmp_path: Path) -> None:
    build(tmp_path)
    home = tmp_path / "engines" / TINY.name
    directories = {"checkpoint": home / "checkpoint", "engine": home / "engine", "repository": tmp_path / "repo"}
    stages = plan(tmp_path).stages
    for stage in stages:
        for path in sorted(directories[stage.name].rglob("*")):
            if path.is_file() and path.stat().st_size and path.name != "manifest.json":
                whole, size = path.read_bytes(), path.stat().st_size
                for position in {0, size // 2, size - 1}:
                    flip(path, position)
                    assert stage.why() == f"{path.relative_to(stage.directory)} has other bytes than were written"
                    path.write_bytes(whole)
    flip(home / "engine" / "rank0.safetensors", -1)
    flip(tmp_path / "repo" / "postprocessing" / "1" / "model.py", 30)
    assert [bool(why) for why in whys(build(tmp_path))] == [False, True, True]
    assert whys(build(tmp_path)) == [None, None, None]


def test_every_changed_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    build(tmp_path)
    path = tmp_path / "repo" / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        flip(path, position)
        with pytest.raises(InputError, match=r"manifest\.json|repo: "):
            read_manifest(tmp_path / "repo", "repository")
        path.write_bytes(whole)


def test_force_makes_every_stage_again(tmp_path: Path) -> None:
    build(tmp_path)
    assert whys(build(tmp_path, force=True)) == ["--force was given"] * 3


def test_a_repository_of_another_engine_is_not_served(tmp_path: Path) -> None:
    build(tmp_path)
    changed = with_settings(TINY, "engine", max_batch_size=3)
    other = plan_build(changed, MODEL, tmp_path / "engines", tmp_path / "repo")
    other.engine.make(force=True)  # as a build that is killed before it writes the repository
    with pytest.raises(InputError, match=r"repo: was written for another engine than the one that is in .*build"):
        check_served_files(tmp_path / "repo")
    build(tmp_path, changed)
    check_served_files(tmp_path / "repo")


def test_a_module_beside_the_models_is_not_served(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "repo" / "tensorrt_llm" / "1" / "numpy.py").write_text("print('imported')")
    with pytest.raises(InputError, match=r"tensorrt_llm/1/numpy\.py does not belong to it"):
        check_served_files(tmp_path / "repo")
    assert whys(build(tmp_path)) == [None, None, "tensorrt_llm/1/numpy.py does not belong to it"]


def test_what_a_killed_build_left_goes_even_if_all_is_up_to_date(tmp_path: Path) -> None:
    build(tmp_path)
    home = tmp_path / "engines" / TINY.name
    for leftover in (home / ".engine.tmp", home / ".checkpoint.old", tmp_path / ".repo.tmp"):
        leftover.mkdir()
        (leftover / "rank0.safetensors").write_bytes(b"15 GB")
    (home / ".engine.lock").write_text("4194303")
    assert reused(build(tmp_path)) == [True, True, True]
    assert names(home) == {"checkpoint", "engine"}
    assert names(tmp_path) == {"engines", "repo"}


@pytest.mark.parametrize("change", ["truncate", "overwrite"])
def test_a_source_that_changes_during_the_conversion_is_noticed(tmp_path: Path, change: str) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    conversion = plan_build(TINY, tmp_path / "model", tmp_path / "engines", tmp_path / "repo")
    writers: list[Any] = []

    def alter(count: int) -> None:
        def write() -> None:
            with weights.open("r+b") as file:  # waits as long as the conversion holds the file
                file.truncate(100) if change == "truncate" else file.write(bytes(100))

        if not writers:
            writers.append(threading.Thread(target=write))
            writers[0].start()

    with pytest.raises(SourceError, match=r"model\.safetensors: (another process opens|was changed)"):
        run_build(conversion, events=BuildEvents(written=alter))
    writers[0].join(60)
    assert not (tmp_path / "engines" / TINY.name / "checkpoint").exists()

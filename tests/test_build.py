from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trtqwen.artifact import read_manifest
from trtqwen.build import StageResult, plan_build, run_build
from trtqwen.demo import MODEL
from trtqwen.errors import EngineError, OutputError
from trtqwen.recipe import Recipe, load_recipe

TINY = load_recipe("qwen2-tiny-cpu")


def build(home: Path, recipe: Recipe = TINY, model: Path = MODEL, *, force: bool = False) -> list[StageResult]:
    return run_build(plan_build(recipe, model, home / "engines", home / "repo"), force=force)


def reused(results: list[StageResult]) -> list[bool]:
    return [result.reused for result in results]


def test_the_stages_are_made_once_and_then_kept(tmp_path: Path) -> None:
    first = build(tmp_path)
    assert [result.stage for result in first] == ["checkpoint", "engine", "repository"]
    assert reused(first) == [False, False, False]
    assert reused(build(tmp_path)) == [True, True, True]


def test_what_changes_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    build(tmp_path)
    serve = TINY.serve.model_copy(update={"max_queue_size": 7})
    changed = TINY.model_copy(update={"serve": serve})
    assert reused(build(tmp_path, changed, force=True)) == [True, True, False]
    engine = TINY.engine.model_copy(update={"max_batch_size": 3})
    assert reused(build(tmp_path, changed.model_copy(update={"engine": engine}), force=True)) == [True, False, False]


def test_another_result_is_not_replaced_unless_forced(tmp_path: Path) -> None:
    build(tmp_path)
    model = tmp_path / "other"
    shutil.copytree(MODEL, model)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = read_manifest(tmp_path / "repo", "repository")
    with pytest.raises(OutputError, match=r"checkpoint: holds another checkpoint.*--force"):
        build(tmp_path, model=model)
    assert read_manifest(tmp_path / "repo", "repository") == before
    assert reused(build(tmp_path, model=model, force=True)) == [False, False, False]


def test_a_damaged_stage_is_not_taken_as_done(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "engines" / TINY.name / "engine" / "rank1.safetensors").unlink()
    assert reused(build(tmp_path, force=True)) == [True, False, True]


def test_without_trtllm_build_the_checkpoint_is_written_all_the_same(tmp_path: Path) -> None:
    engine = TINY.engine.model_copy(update={"builder": "tensorrt_llm"})
    with pytest.raises(EngineError, match="trtllm-build is not on this machine: the checkpoint is written"):
        build(tmp_path, TINY.model_copy(update={"engine": engine}))
    assert read_manifest(tmp_path / "engines" / TINY.name / "checkpoint", "checkpoint")
    assert not (tmp_path / "repo").exists()

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trtqwen.artifact import read_manifest
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine, engine_key, trtllm_build_command
from trtqwen.engine.config import read_engine_config
from trtqwen.errors import EngineError, InputError, OutputError
from trtqwen.recipe import CheckpointRecipe, EngineRecipe

TORCH = EngineRecipe(builder="torch", max_batch_size=8, max_num_tokens=64, max_seq_len=256)
TENSORRT = EngineRecipe(builder="tensorrt_llm", max_seq_len=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("builder") / "checkpoint"
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="bfloat16", tp_size=2)), out)
    return out


def test_a_torch_engine_is_the_checkpoint_with_limits(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build_engine(checkpoint, TORCH, tmp_path / "engine")
    config = read_engine_config(tmp_path / "engine")
    assert (config.builder, config.build_config.max_batch_size, config.build_config.max_seq_len) == ("torch", 8, 256)
    assert config.pretrained_config.mapping.tp_size == 2
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        assert os.path.samefile(checkpoint / rank, tmp_path / "engine" / rank)
    source = read_manifest(checkpoint, "checkpoint")
    assert manifest.key == engine_key(source.key, TORCH)
    assert (tmp_path / "engine" / "tokenizer" / "tokenizer.json").is_file()


def test_the_key_follows_checkpoint_and_limits() -> None:
    other = TORCH.model_copy(update={"max_batch_size": 4})
    assert len({engine_key("a", TORCH), engine_key("b", TORCH), engine_key("a", other)}) == 3


def test_the_rank_files_are_copied_where_links_cannot_go(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    build_engine(checkpoint, TORCH, tmp_path / "engine")
    copy = tmp_path / "engine" / "rank1.safetensors"
    assert copy.read_bytes() == (checkpoint / "rank1.safetensors").read_bytes()
    assert copy.stat().st_nlink == 1


def test_without_trtllm_build_one_sentence_has_the_command(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="trtllm-build is not on this machine") as caught:
        build_engine(checkpoint, TENSORRT, tmp_path / "engine")
    assert " ".join(trtllm_build_command(checkpoint, TENSORRT, tmp_path / "engine")) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "engine").exists()


def test_limits_beyond_the_model_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    recipe = TORCH.model_copy(update={"max_seq_len": 4096})
    with pytest.raises(InputError, match=r"engine\.max_seq_len 4096 exceeds .* 2048"):
        build_engine(checkpoint, recipe, tmp_path / "engine")


def test_unfinished_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(InputError, match="is not a finished checkpoint"):
        build_engine(tmp_path / "half", TORCH, tmp_path / "engine")


def test_an_engine_that_exists_is_kept(bundled_engine: Callable[..., Path], checkpoint: Path) -> None:
    engine = bundled_engine(1)
    with pytest.raises(OutputError, match="exists; pass --force"):
        build_engine(checkpoint, TORCH, engine)
    assert read_engine_config(engine).pretrained_config.mapping.tp_size == 1


def test_broken_engine_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: is missing"):
        read_engine_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"builder": "torch"}))
    with pytest.raises(InputError, match="is not the config of a trtqwen engine"):
        read_engine_config(tmp_path)

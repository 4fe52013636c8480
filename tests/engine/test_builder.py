from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hf.layouts import LAYOUTS
from trtqwen.artifact.manifest import read_manifest
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.diagnostics import InputError, OutputError
from trtqwen.engine.builder import build_engine, engine_key
from trtqwen.engine.config import Backend, read_engine_config
from trtqwen.engine.limits import check_computed
from trtqwen.hf.config import load_config
from trtqwen.recipe import CheckpointRecipe, EngineRecipe

TORCH = EngineRecipe(backend="torch", max_batch_size=8, max_num_tokens=64, max_seq_len=256)
TENSORRT = TORCH.model_copy(update={"backend": "tensorrt_llm"})


def test_a_torch_engine_is_the_checkpoint_with_limits(checkpoint: Path, tmp_path: Path) -> None:
    manifest = build_engine(checkpoint, TORCH, tmp_path / "engine")
    config = read_engine_config(tmp_path / "engine")
    assert (config.backend, config.build_config.max_batch_size, config.build_config.max_seq_len) == ("torch", 8, 256)
    assert config.pretrained_config.mapping.tp_size == 2
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        assert os.path.samefile(checkpoint / rank, tmp_path / "engine" / rank)
    source = read_manifest(checkpoint, "checkpoint")
    assert manifest.key == engine_key(source.key, TORCH)
    assert (tmp_path / "engine" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("recipe", [TORCH, TENSORRT])
def test_the_key_follows_what_changes_the_engine(recipe: EngineRecipe) -> None:
    key = engine_key("a", recipe)
    assert key != engine_key("b", recipe)
    assert key != engine_key("a", recipe.model_copy(update={"max_batch_size": 4}))
    assert key == engine_key("a", recipe.model_copy(update={"workers": 4}))


def test_build_flags_are_in_the_key_of_a_tensorrt_engine_alone() -> None:
    change = {"gemm_plugin": "disable"}
    assert engine_key("a", TENSORRT) != engine_key("a", TENSORRT.model_copy(update=change))
    assert engine_key("a", TORCH) == engine_key("a", TORCH.model_copy(update=change))
    assert engine_key("a", TORCH) != engine_key("a", TENSORRT)


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


def test_an_engine_of_a_1m_model_ends_where_dual_chunk_attention_begins(tmp_path: Path) -> None:
    """Built from the checkpoint alone, without the model's config.json."""
    [layout] = [layout for layout in LAYOUTS if layout.name == "qwen2.5-1m"]
    run_conversion(plan_conversion(layout.make(tmp_path), CheckpointRecipe(dtype="float32")), tmp_path / "checkpoint")
    beyond = TORCH.model_copy(update={"max_seq_len": 262145})
    with pytest.raises(InputError, match="262145 exceeds the checkpoint's max_position_embeddings 262144"):
        build_engine(tmp_path / "checkpoint", beyond, tmp_path / "engine")
    build_engine(tmp_path / "checkpoint", TORCH.model_copy(update={"max_seq_len": 262144}), tmp_path / "engine")


def test_an_attention_factor_is_refused_for_engines_that_do_not_read_it(tmp_path: Path) -> None:
    [layout] = [layout for layout in LAYOUTS if layout.name == "yarn-attention"]
    config = load_config(layout.make(tmp_path))
    refusing: tuple[Backend, ...] = ("vllm", "llmapi")
    for backend in refusing:
        with pytest.raises(InputError, match=f"attention factor of its own.*backend {backend} does not compute"):
            check_computed(backend, config)
    check_computed("torch", config)
    check_computed("tensorrt_llm", config)


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
    (tmp_path / "config.json").write_text(json.dumps({"backend": "torch"}))
    with pytest.raises(InputError, match="is not the config of a trtqwen engine"):
        read_engine_config(tmp_path)

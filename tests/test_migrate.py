"""Recipes for other engines: every bundled one migrates, what is lost is told, and the commands are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import trtqwen
from trtqwen.diagnostics import InputError, OutputError
from trtqwen.migrate import Backend, plan_migration, write_migration
from trtqwen.recipe import find_recipe, load_recipe, recipe_names


def told(migration: Any, kind: str) -> str:
    return "\n".join(f"{note.setting} {note.text}" for note in getattr(migration, kind))


@pytest.mark.parametrize("to", ["vllm", "llmapi", "torch"])
@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_migrates(name: str, to: Backend, tmp_path: Path) -> None:
    source = load_recipe(name)
    if source.engine.backend == to:
        with pytest.raises(InputError, match="already"):
            plan_migration(name, to)
        return
    migration = plan_migration(name, to)
    write_migration(migration, tmp_path / "new.yaml")
    made = load_recipe(str(tmp_path / "new.yaml"))
    assert made.engine.backend == to
    for limit in ("max_batch_size", "max_num_tokens", "max_seq_len"):
        assert getattr(made.engine, limit) == getattr(source.engine, limit)
    assert made.serve.replicas == (1 if to == "torch" else source.serve.replicas)
    assert (made.checkpoint.tp_size, made.checkpoint.pp_size) == (
        source.checkpoint.tp_size,
        source.checkpoint.pp_size,
    )
    if source.checkpoint.kv_cache == "int8" and to != "torch":
        assert "kv_cache" in told(migration, "lost")
    if source.checkpoint.quant == "int8_sq":
        assert ("SmoothQuant" in told(migration, "lost")) == (to == "llmapi")
    assert any(command.startswith("trtqwen serve") for _, command in migration.commands)
    noted = "\n".join(told(migration, kind) for kind in ("same", "changed", "lost"))
    raw = yaml.safe_load(find_recipe(name).read_text())
    for section in ("checkpoint", "engine", "serve"):
        for field in raw.get(section, {}):
            assert field in noted or field in ("backend", "builder"), f"{section}.{field} is dropped without a word"


def written(tmp_path: Path, **sections: Any) -> Path:
    content: dict[str, Any] = {
        "description": "d",
        "model": "qwen2.5-7b",
        "host": {"card": "rtx-4090d", "gpus": 4},
        "engine": {"backend": "tensorrt_llm"},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_is_lost_is_told(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        engine={"gather_context_logits": True, "workers": 4, "tokens_per_block": 8, "multiple_profiles": True},
        serve={
            "kv_cache_host_memory_bytes": 1 << 30,
            "enable_context_fmha_fp32_acc": True,
            "replica_mode": "orchestrator",
            "replicas": 2,
        },
    )
    migration = plan_migration(str(path), "vllm")
    lost, changed = told(migration, "lost"), told(migration, "changed")
    for setting in (
        "gather_context_logits",
        "kv_cache_host_memory_bytes",
        "guaranteed_no_evict",
        "multiple_profiles",
    ):
        assert setting in lost
    for setting in ("tokens_per_block", "fp32_acc", "replica_mode"):
        assert setting in changed
    assert "--max-num-seqs" in told(migration, "same")
    write_migration(migration, tmp_path / "new.yaml")
    assert load_recipe(str(tmp_path / "new.yaml")).engine.tokens_per_block == 16
    with pytest.raises(OutputError, match="exists"):
        write_migration(migration, tmp_path / "new.yaml")


def test_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, checkpoint={"quant": "int8_wo", "int8_layout": "sm80", "dtype": "float16"})
    words = ["migrate", str(path), "--to", "llmapi", "--output", str(tmp_path / "new.yaml"), "--json"]
    done = trtqwen(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["output"] == str(tmp_path / "new.yaml")
    assert any("plain" in change["what"] for change in report["changes"])
    assert load_recipe(report["output"]).checkpoint.int8_layout == "plain"

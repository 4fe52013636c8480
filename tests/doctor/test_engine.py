"""Engines and checkpoints beside hosts and recipes that they were not made for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.conftest import IN_IMAGE, check, trtllm_engine
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.doctor.subject import Subject, System
from trtqwen.recipe import CheckpointRecipe, Recipe, load_recipe
from trtqwen.system.host import Host

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
PAGED = {"tokens_per_block": 32, "use_paged_context_fmha": False}


def recipe(max_seq_len: int = 32768, **checkpoint: Any) -> Recipe:
    loaded = load_recipe("qwen2.5-7b-fp16-tp4-4090d")
    engine = loaded.engine.model_copy(update={"max_seq_len": max_seq_len})
    changed = loaded.checkpoint.model_copy(update=checkpoint)
    return loaded.model_copy(update={"engine": engine, "checkpoint": changed})


@pytest.mark.parametrize(
    ("host", "verdict", "says"),
    [
        (Host(), "skip", "the engine is of 1.2.1"),
        (IN_IMAGE, "ok", "TensorRT-LLM 1.2.1"),
        (replace(IN_IMAGE, tensorrt_llm="1.0.0", tensorrt="10.11.0.33"), "fail", "1.2.1"),
        (replace(IN_IMAGE, tensorrt_llm=None, tensorrt=None), "fail", "26.07-trtllm-python-py3"),
    ],
)
def test_engines_of_another_release(tmp_path: Path, host: Host, verdict: str, says: str) -> None:
    result = check("D01", Subject(host, engine=trtllm_engine(tmp_path / "engine")))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


def test_torch_engines_run_anywhere(bundled_engine: Callable[..., Path]) -> None:
    assert check("D01", Subject(Host(), engine=bundled_engine())).verdict == "ok"


def test_a_directory_that_is_no_engine(tmp_path: Path) -> None:
    assert check("D01", Subject(Host(), engine=tmp_path)).verdict == "fail"
    assert check("D17", Subject(Host(), engine=tmp_path)).evidence.endswith("see D01")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run_conversion(plan_conversion(MODEL, CheckpointRecipe(tp_size=2)), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


def test_checkpoints_are_held_against_the_installed_release(checkpoint: Path) -> None:
    assert check("D04", Subject(IN_IMAGE, checkpoint=checkpoint)).verdict == "ok"
    older = replace(IN_IMAGE, tensorrt_llm="1.0.0")
    refused = check("D04", Subject(older, checkpoint=checkpoint))
    assert refused.verdict == "fail"
    assert "1.0.0 refuses mlp_only_layers, decoder_sparse_step in its top level" in refused.evidence
    assert "checkpoint.release 1.0.0" in refused.hint
    assert check("D04", Subject(Host(), recipe=recipe(release="1.0.0"), checkpoint=checkpoint)).verdict == "fail"
    edit(checkpoint / "config.json", rotary_scaling=YARN)
    assert "rotary_scaling yarn: 1.0.0 computes" in check("D04", Subject(older, checkpoint=checkpoint)).evidence


def test_checkpoints_miss_no_rank(checkpoint: Path) -> None:
    (checkpoint / "rank1.safetensors").unlink()
    assert "rank1.safetensors is missing" in check("D04", Subject(Host(), checkpoint=checkpoint)).evidence


@pytest.mark.parametrize(
    ("tokens", "factor", "engine", "verdict", "says"),
    [
        (32768, None, None, "ok", "recipe 32,768 tokens"),
        (131072, None, None, "fail", "checkpoint.yarn_factor 4"),
        (65536, None, None, "fail", "checkpoint.yarn_factor 2"),
        (131072, 4.0, None, "ok", "with YaRN"),
        (8192, 4.0, None, "warn", "costs short prompts"),
        (
            131072,
            4.0,
            {"build_config__max_seq_len": 131072},
            "fail",
            "engine: 131,072 tokens, but the model",
        ),
        (
            131072,
            4.0,
            {
                "build_config__max_seq_len": 131072,
                "pretrained_config__rotary_scaling": YARN,
                "pretrained_config__max_position_embeddings": 131072,
            },
            "ok",
            "engine 131,072 tokens of 131,072 with YaRN",
        ),
    ],
)
def test_long_context(
    tmp_path: Path, tokens: int, factor: float | None, engine: dict[str, Any] | None, verdict: str, says: str
) -> None:
    built = None if engine is None else trtllm_engine(tmp_path / "engine", **engine)
    result = check("D17", Subject(Host(), recipe=recipe(tokens, yarn_factor=factor), engine=built))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


def test_yarn_that_the_checkpoint_lost(checkpoint: Path) -> None:
    result = check("D17", Subject(Host(), recipe=recipe(65536, yarn_factor=2.0), checkpoint=checkpoint))
    assert (result.verdict, result.evidence.startswith("checkpoint: 65,536")) == ("fail", True)


def test_paged_context_that_the_builder_switched_off(tmp_path: Path) -> None:
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "INT8"}
    changes: dict[str, Any] = {"build_config__plugin_config": PAGED, "pretrained_config__quantization": quantization}
    engine = trtllm_engine(tmp_path / "engine", **changes)
    result = check("D18", Subject(Host(), System(), recipe(), engine=engine))
    assert result.verdict == "fail"
    assert "it has no kernel for a KV cache in INT8" in result.evidence
    assert "enable_chunked_context: the engine has no use_paged_context_fmha" in result.evidence
    assert check("D18", Subject(Host(), recipe=recipe())).verdict == "skip"

"""The repository: upstream's contract to the letter, and a directory that stands on its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from trtqwen.artifact import read_manifest, write_manifest
from trtqwen.errors import InputError, OutputError
from trtqwen.recipe import ServeRecipe
from trtqwen.triton.repository import plan_repository, repository_key, tokenizer_directory, write_repository

UPSTREAM = json.loads(Path(__file__).with_name("data").joinpath("upstream.json").read_text("utf-8"))["models"]
PLACEHOLDERS = {
    "${logits_datatype}": "TYPE_FP32",
    "${prompt_embedding_table_data_type}": "TYPE_FP16",
    "${encoder_input_features_data_type}": "TYPE_FP16",
}
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble")


def read(repository: Path, model: str) -> ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text("utf-8"), ModelConfig())


@pytest.fixture
def copied_engine(bundled_engine: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled_engine(), tmp_path / "engine"))


def as_upstream(tensors: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    return {
        tensor["name"]: (
            PLACEHOLDERS.get(tensor["data_type"], tensor["data_type"]),
            tensor["dims"],
            tensor.get("optional", False),
            tensor.get("allow_ragged_batch", False),
            tensor.get("reshape"),
        )
        for tensor in tensors
    }


def as_ours(tensors: Any) -> dict[str, tuple[Any, ...]]:
    names = [tensor.name for tensor in tensors]
    assert len(names) == len(set(names))
    return {
        tensor.name: (
            DataType.Name(tensor.data_type),
            list(tensor.dims),
            getattr(tensor, "optional", False),
            getattr(tensor, "allow_ragged_batch", False),
            list(tensor.reshape.shape) if tensor.HasField("reshape") else None,
        )
        for tensor in tensors
    }


@pytest.mark.parametrize("model", MODELS)
def test_tensors_are_upstreams(repository: Path, model: str) -> None:
    config = read(repository, model)
    assert config.name == model
    assert as_ours(config.input) == as_upstream(UPSTREAM[model]["inputs"])
    assert as_ours(config.output) == as_upstream(UPSTREAM[model]["outputs"])


@pytest.mark.parametrize("model", MODELS)
def test_parameter_keys_are_upstreams(repository: Path, model: str) -> None:
    beyond = {"chat_template"} if model == "preprocessing" else set()
    assert set(read(repository, model).parameters) == set(UPSTREAM[model]["parameters"]) | beyond


def test_ensemble_steps_are_upstreams(repository: Path) -> None:
    config = read(repository, "ensemble")
    steps = [
        {
            "model_name": step.model_name,
            "model_version": step.model_version,
            "input_map": dict(step.input_map),
            "output_map": dict(step.output_map),
        }
        for step in config.ensemble_scheduling.step
    ]
    assert config.platform == "ensemble"
    assert steps == UPSTREAM["ensemble"]["steps"]


def test_settings_reach_the_configs(bundled_engine: Callable[..., Path]) -> None:
    serve = ServeRecipe(
        batch_scheduler_policy="max_utilization",
        enable_chunked_context=False,
        enable_context_fmha_fp32_acc=True,
        kv_cache_free_gpu_mem_fraction=0.5,
        max_tokens_in_paged_kv_cache=4096,
        max_queue_size=7,
        triton_max_batch_size=3,
        exclude_input_in_output=False,
        preprocessing_instance_count=2,
        postprocessing_instance_count=4,
        skip_special_tokens=False,
    )
    engine = bundled_engine()
    configs = plan_repository(engine, serve).configs
    llm = configs["tensorrt_llm"]
    given = {key: value.string_value for key, value in llm.parameters.items() if value.string_value}
    assert given == {
        "max_beam_width": "1",
        "enable_context_fmha_fp32_acc": "True",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(engine.resolve()),
        "max_tokens_in_paged_kv_cache": "4096",
        "batch_scheduler_policy": "max_utilization",
        "kv_cache_free_gpu_mem_fraction": "0.5",
        "exclude_input_in_output": "False",
        "enable_kv_cache_reuse": "False",
        "enable_chunked_context": "False",
        "tokenizer_dir": "../preprocessing/1/tokenizer",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    }
    assert llm.model_transaction_policy.decoupled
    assert llm.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert {config.max_batch_size for config in configs.values()} == {3}
    assert configs["preprocessing"].instance_group[0].count == 2
    assert configs["postprocessing"].instance_group[0].count == 4
    assert configs["postprocessing"].dynamic_batching.preserve_ordering
    assert configs["postprocessing"].parameters["skip_special_tokens"].string_value == "False"


def test_chat_template_is_the_models_own(repository: Path) -> None:
    settings = json.loads((tokenizer_directory(repository) / "tokenizer_config.json").read_text("utf-8"))
    assert read(repository, "preprocessing").parameters["chat_template"].string_value == settings["chat_template"]


def test_the_key_follows_engine_settings_and_place(bundled_engine: Callable[..., Path], repository: Path) -> None:
    serve = ServeRecipe(triton_max_batch_size=8)
    engine = bundled_engine()
    key = read_manifest(engine, "engine").key
    assert read_manifest(repository, "repository").key == repository_key(engine, key, serve)
    others = [(engine, key, ServeRecipe()), (engine, "other", serve), (engine / "moved", key, serve)]
    assert all(repository_key(*other) != repository_key(engine, key, serve) for other in others)


def test_python_models_are_copies_and_refer_to_nothing_outside_but_the_engine(repository: Path) -> None:
    for model in ("preprocessing", "tensorrt_llm", "postprocessing"):
        assert "class TritonPythonModel" in (repository / model / "1" / "model.py").read_text("utf-8")
        tokenizer = repository / model / read(repository, model).parameters["tokenizer_dir"].string_value
        assert tokenizer.resolve() == tokenizer_directory(repository).resolve()


def test_a_tensorrt_engine_gets_the_cpp_backend_and_no_model_py(copied_engine: Path, tmp_path: Path) -> None:
    config = json.loads((copied_engine / "config.json").read_text("utf-8"))
    (copied_engine / "config.json").write_text(json.dumps({**config, "builder": "tensorrt_llm"}), encoding="utf-8")
    (copied_engine / "manifest.json").unlink()
    write_manifest(copied_engine, "engine", {}, {})
    write_repository(copied_engine, ServeRecipe(), tmp_path / "repository")
    llm = read(tmp_path / "repository", "tensorrt_llm")
    assert llm.backend == "tensorrtllm"
    assert llm.model_transaction_policy.decoupled
    assert not (tmp_path / "repository" / "tensorrt_llm" / "1" / "model.py").exists()
    assert (tmp_path / "repository" / "tensorrt_llm" / "1").is_dir()
    assert read(tmp_path / "repository", "preprocessing").backend == "python"


def test_an_engine_without_tokenizer_is_refused(copied_engine: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied_engine / "tokenizer")
    (copied_engine / "manifest.json").unlink()
    write_manifest(copied_engine, "engine", {}, {})
    with pytest.raises(InputError, match=r"tokenizer: is missing.*build again"):
        write_repository(copied_engine, ServeRecipe(), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_an_existing_repository_is_replaced_only_by_force(
    bundled_engine: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "repository"
    write_repository(bundled_engine(), ServeRecipe(), output)
    with pytest.raises(OutputError, match="--force"):
        write_repository(bundled_engine(), ServeRecipe(), output)
    write_repository(bundled_engine(), ServeRecipe(max_queue_size=3), output, force=True)
    assert read(output, "tensorrt_llm").dynamic_batching.default_queue_policy.max_queue_size == 3

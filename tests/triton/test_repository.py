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

from tests.models import their_tokenizer
from trtqwen.artifact.manifest import read_manifest, write_manifest
from trtqwen.artifact.names import tokenizer_directory
from trtqwen.diagnostics import InputError, OutputError
from trtqwen.recipe import TORCH_SERVING, ServeRecipe
from trtqwen.triton.repository import RepositoryStage, plan_repository, write_repository

UPSTREAM = json.loads(Path(__file__).with_name("data").joinpath("upstream.json").read_text("utf-8"))["models"]
PLACEHOLDERS = {
    "${logits_datatype}": "TYPE_FP32",
    "${prompt_embedding_table_data_type}": "TYPE_FP16",
    "${encoder_input_features_data_type}": "TYPE_FP16",
}
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")
Engine = Callable[..., Path]


def read(repository: Path, model: str) -> ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text("utf-8"), ModelConfig())


@pytest.fixture
def copied_engine(bundled_engine: Engine, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled_engine(), tmp_path / "engine"))


@pytest.fixture
def tensorrt_engine(bundled_engine: Engine, tmp_path: Path) -> Engine:
    """An engine directory as trtllm-build leaves it, as far as a repository looks at it."""

    def make(tp_size: int = 1, version: str = "1.2.1", logits_dtype: str = "float32") -> Path:
        engine = Path(shutil.copytree(bundled_engine(tp_size), tmp_path / "engine"))
        config = json.loads((engine / "config.json").read_text("utf-8"))
        config |= {"backend": "tensorrt_llm", "version": version}
        config["pretrained_config"]["logits_dtype"] = logits_dtype
        (engine / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (engine / "manifest.json").unlink()
        write_manifest(engine, "engine", {}, {})
        return engine

    return make


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


def test_the_models_are_upstreams(repository: Path) -> None:
    assert set(MODELS) == set(UPSTREAM) == {path.parent.name for path in repository.glob("*/config.pbtxt")}


@pytest.mark.parametrize("backend", ["torch", "tensorrt_llm"])
@pytest.mark.parametrize("model", MODELS)
def test_tensors_are_upstreams(repository: Path, tensorrt_engine: Engine, model: str, backend: str) -> None:
    if backend == "torch":
        config = read(repository, model)
    else:
        config = plan_repository(tensorrt_engine(), ServeRecipe()).configs[model]
    assert config.name == model
    assert as_ours(config.input) == as_upstream(UPSTREAM[model]["inputs"])
    assert as_ours(config.output) == as_upstream(UPSTREAM[model]["outputs"])


@pytest.mark.parametrize("model", MODELS)
def test_parameter_keys_are_upstreams(repository: Path, model: str) -> None:
    beyond = {"preprocessing": {"chat_template"}, "tensorrt_llm": set(TORCH_SERVING)}.get(model, set())
    upstreams = {parameter["name"] for parameter in UPSTREAM[model]["parameters"]}
    assert set(read(repository, model).parameters) == upstreams | beyond


KINDS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
    "path": str,
    "string": str,
    "string;": str,
}


@pytest.mark.parametrize("model", MODELS)
def test_parameters_have_upstreams_types(tensorrt_engine: Engine, model: str) -> None:
    serve = ServeRecipe(replicas=2, max_tokens_in_paged_kv_cache=4096, kv_cache_host_memory_bytes=1 << 30)
    parameters = plan_repository(tensorrt_engine(2), serve).configs[model].parameters
    filled = {key: value.string_value for key, value in parameters.items() if value.string_value}
    for row in UPSTREAM[model]["parameters"]:
        if row["name"] in filled:
            KINDS[row["type"].split()[0]](filled[row["name"]])
            choices = row.get("allowed", "").split("|")
            assert len(choices) == 1 or filled[row["name"]] in choices
    assert not [value for value in filled.values() if "${" in value]


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


@pytest.mark.parametrize("version", ["0.18.2", "0.19.0", "0.21.0", "1.0.0", "1.2.1", "1.2.0rc3"])
def test_names_follow_the_release_that_built_the_engine(tensorrt_engine: Engine, version: str) -> None:
    configs = plan_repository(tensorrt_engine(version=version), ServeRecipe()).configs
    for model in ("tensorrt_llm", "ensemble", "tensorrt_llm_bls"):
        names = {tensor.name for tensor in (*configs[model].input, *configs[model].output)}
        old = version.startswith("0.")
        assert ({"min_length", "random_seed"} <= names) == old
        assert ({"min_tokens", "seed"} <= names) == (not old)
        assert ("num_output_tokens" in names) == ("return_num_input_tokens" in names) == (not old)
        assert ("guided_decoding_guide" in names) == (version != "0.18.2")
        assert (
            ("return_kv_cache_reuse_stats" in names) == ("return_perf_metrics" not in names) == (version == "0.18.2")
        )
    parameters = configs["preprocessing"].parameters
    assert ("visual_model_path" in parameters) == ("multimodal_model_path" not in parameters) == (version == "0.18.2")
    assert ("tokenizer_dir" in configs["tensorrt_llm"].parameters) == (version != "0.18.2")


@pytest.mark.parametrize("version", ["0.18.2", "0.19.0", "1.2.1"])
def test_every_step_of_the_ensemble_names_tensors_that_exist(tensorrt_engine: Engine, version: str) -> None:
    configs = plan_repository(tensorrt_engine(version=version), ServeRecipe()).configs
    ensemble = configs["ensemble"]
    known = {tensor.name for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        assert set(step.input_map) <= {tensor.name for tensor in model.input}
        assert {tensor.name for tensor in model.input if not tensor.optional} <= set(step.input_map)
        assert set(step.output_map) <= {tensor.name for tensor in model.output}
        assert set(step.input_map.values()) <= known
        known |= set(step.output_map.values())
    assert {tensor.name for tensor in ensemble.output} <= known


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
        "device": "auto",
        "cuda_graphs": "True",
        "overlap": "True",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "guided_decoding_backend": "xgrammar",
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


def test_one_process_for_text_has_no_batcher(repository: Path) -> None:
    """It would reject steps of clients that have left, which crashes Triton's ensembles."""
    assert not read(repository, "postprocessing").HasField("dynamic_batching")


def test_chat_template_is_the_models_own(repository: Path) -> None:
    settings = json.loads((tokenizer_directory(repository) / "tokenizer_config.json").read_text("utf-8"))
    assert read(repository, "preprocessing").parameters["chat_template"].string_value == settings["chat_template"]


def test_the_key_follows_engine_settings_and_place(bundled_engine: Callable[..., Path], repository: Path) -> None:
    serve = ServeRecipe(triton_max_batch_size=8)
    engine = bundled_engine()
    key = read_manifest(engine, "engine").key
    own = read_manifest(repository, "repository").key
    assert own == RepositoryStage(engine, key, serve, repository).key()
    others = [(engine, key, ServeRecipe()), (engine, "other", serve), (engine / "moved", key, serve)]
    assert all(RepositoryStage(*other, repository).key() != own for other in others)


def test_python_models_are_copies_and_refer_to_nothing_outside_but_the_engine(repository: Path) -> None:
    for model in ("preprocessing", "tensorrt_llm", "postprocessing", "tensorrt_llm_bls"):
        assert "class TritonPythonModel" in (repository / model / "1" / "model.py").read_text("utf-8")
        parameters = read(repository, model).parameters
        if "tokenizer_dir" in parameters:
            tokenizer = repository / model / parameters["tokenizer_dir"].string_value
            assert tokenizer.resolve() == tokenizer_directory(repository).resolve()


def test_a_tensorrt_engine_gets_the_cpp_backend_and_no_model_py(tensorrt_engine: Engine, tmp_path: Path) -> None:
    serve = ServeRecipe(
        replicas=2,
        replica_mode="orchestrator",
        enable_kv_cache_reuse=True,
        enable_context_fmha_fp32_acc=True,
        kv_cache_host_memory_bytes=1 << 33,
        max_queue_size=256,
    )
    engine = tensorrt_engine(2, logits_dtype="float16")
    write_repository(engine, serve, tmp_path / "repository")
    llm = read(tmp_path / "repository", "tensorrt_llm")
    assert llm.backend == "tensorrtllm"
    assert llm.model_transaction_policy.decoupled
    assert [(group.count, group.kind) for group in llm.instance_group] == [(2, llm.instance_group[0].KIND_CPU)]
    given = {key: value.string_value for key, value in llm.parameters.items() if value.string_value}
    assert given == {
        "max_beam_width": "1",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(engine),
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": "0.9",
        "kv_cache_host_memory_bytes": "8589934592",
        "exclude_input_in_output": "True",
        "enable_kv_cache_reuse": "True",
        "enable_chunked_context": "True",
        "enable_context_fmha_fp32_acc": "True",
        "gpu_device_ids": "0,1;2,3",
        "recv_poll_period_ms": "1",
        "tokenizer_dir": "../preprocessing/1/tokenizer",
        "guided_decoding_backend": "xgrammar",
        "xgrammar_tokenizer_info_path": str(tmp_path / "repository/tensorrt_llm/1/xgrammar_tokenizer_info.json"),
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    }
    logits = {tensor.name: tensor.data_type for tensor in llm.output if tensor.name.endswith("_logits")}
    assert logits == dict.fromkeys(("context_logits", "generation_logits"), DataType.TYPE_FP16)
    assert not (tmp_path / "repository" / "tensorrt_llm" / "1" / "model.py").exists()
    assert (tmp_path / "repository" / "tensorrt_llm" / "1").is_dir()
    postprocessing = read(tmp_path / "repository", "postprocessing")
    assert postprocessing.backend == "python"
    assert postprocessing.parameters["holds_characters"].string_value == "True"


def test_guided_decoding_of_a_tensorrt_engine_knows_the_tokenizer(tensorrt_engine: Engine, tmp_path: Path) -> None:
    engine = tensorrt_engine()
    write_repository(engine, ServeRecipe(), tmp_path / "repository")
    path = read(tmp_path / "repository", "tensorrt_llm").parameters["xgrammar_tokenizer_info_path"].string_value
    info = json.loads(Path(path).read_text("utf-8"))
    tokenizer = their_tokenizer(engine / "tokenizer")
    assert info["encoded_vocab"] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert json.loads(info["tokenizer_str"]) == json.loads(tokenizer.backend_tokenizer.to_str())
    assert tokenizer.eos_token_id in info["stop_token_ids"]


def test_one_engine_on_one_card_is_one_group(tensorrt_engine: Engine) -> None:
    llm = plan_repository(tensorrt_engine(), ServeRecipe()).configs["tensorrt_llm"]
    assert llm.parameters["gpu_device_ids"].string_value == "0"
    assert llm.instance_group[0].count == 1


def test_replicas_on_servers_of_their_own_are_one_group_each(tensorrt_engine: Engine) -> None:
    llm = plan_repository(tensorrt_engine(2), ServeRecipe(replicas=2)).configs["tensorrt_llm"]
    assert llm.parameters["gpu_device_ids"].string_value == "0,1"
    assert llm.instance_group[0].count == 1


def test_held_characters_need_a_single_process(tensorrt_engine: Engine) -> None:
    with pytest.raises(InputError, match=r"serve\.postprocessing_instance_count: 4 processes cannot keep"):
        plan_repository(tensorrt_engine(), ServeRecipe(postprocessing_instance_count=4))


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

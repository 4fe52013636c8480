"""Writes the model repository of an engine: four models in the tensor contract of upstream's in-flight batching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from trtqwen.artifact import Manifest, finished_directory, read_manifest, stage_key, write_manifest
from trtqwen.checkpoint.convert import TOKENIZER_DIRECTORY
from trtqwen.engine.config import Builder, read_engine_config
from trtqwen.errors import InputError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import ServeRecipe

CONFIG = "config.pbtxt"
_CONTRACT = Path(__file__).with_name("contract.json")
_MODELS = Path(__file__).with_name("models")
_BACKENDS: dict[Builder, str] = {"torch": "python", "tensorrt_llm": "tensorrtllm"}

# The repository carries its own copy of the tokenizer: building the engine again under a running server does not
# change it, and the manifest accounts for it. Models find it relative to their directory, so a repository can move.
_TOKENIZER = Path("preprocessing", "1", TOKENIZER_DIRECTORY)
_TOKENIZER_FROM_MODEL = Path("..") / _TOKENIZER


@dataclass(frozen=True)
class RepositoryPlan:
    """What a repository will hold.

    Attributes:
        engine: absolute path of the engine directory.
        engine_key: its manifest key.
        configs: each model's config, by model name.
        python_models: the models that get a `model.py`.
    """

    engine: Path
    engine_key: str
    configs: Mapping[str, ModelConfig]
    python_models: tuple[str, ...]


def repository_key(engine: Path, engine_key: str, serve: ServeRecipe) -> str:
    """The manifest key of the repository that `write_repository` would write for an engine with this key."""
    return stage_key("repository", {"engine": engine_key}, _parameters(engine, serve))


def tokenizer_directory(repository: Path) -> Path:
    """Where a repository keeps its tokenizer."""
    return repository / _TOKENIZER


def plan_repository(engine: Path, serve: ServeRecipe) -> RepositoryPlan:
    """Work out every model's config for a finished engine.

    Raises:
        InputError: if the engine is not finished or has no tokenizer.
    """
    engine = engine.resolve()
    manifest = read_manifest(engine, "engine")
    builder = read_engine_config(engine).builder
    if not (engine / TOKENIZER_DIRECTORY).is_dir():
        raise InputError(
            f"{engine / TOKENIZER_DIRECTORY}: is missing, but Triton's text models need it; put tokenizer.json and "
            "tokenizer_config.json beside the model's weights and build again"
        )
    tokenizer = Tokenizer(engine / TOKENIZER_DIRECTORY)
    configs = {
        "preprocessing": _preprocessing(serve, tokenizer),
        "tensorrt_llm": _tensorrt_llm(serve, engine, builder),
        "postprocessing": _postprocessing(serve),
        "ensemble": _model("ensemble", serve),
    }
    configs["ensemble"].platform = "ensemble"
    python_models = tuple(name for name, config in configs.items() if config.backend == "python")
    return RepositoryPlan(engine, manifest.key, configs, python_models)


def write_repository(engine: Path, serve: ServeRecipe, output: Path, *, force: bool = False) -> Manifest:
    """Write the Triton model repository of a finished engine.

    Raises:
        InputError: if the engine is not finished or has no tokenizer.
        OutputError: if `output` exists and `force` is not set.
    """
    plan = plan_repository(engine, serve)
    with finished_directory(output, force=force) as directory:
        for name, config in plan.configs.items():
            version = directory / name / "1"
            version.mkdir(parents=True)
            (directory / name / CONFIG).write_text(config_text(config), encoding="utf-8")
            if name in plan.python_models:
                shutil.copyfile(_MODELS / f"{name}.py", version / "model.py")
            else:
                # Triton wants a version directory with something in it that no copy or archive drops.
                (version / ".keep").touch()
        shutil.copytree(plan.engine / TOKENIZER_DIRECTORY, tokenizer_directory(directory))
        return write_manifest(directory, "repository", {"engine": plan.engine_key}, _parameters(engine, serve))


def config_text(config: ModelConfig) -> str:
    """`config.pbtxt` of a config, proved to read back as the same config."""
    text = str(text_format.MessageToString(config, as_utf8=True))
    assert text_format.Parse(text, ModelConfig()) == config
    return text


def _parameters(engine: Path, serve: ServeRecipe) -> dict[str, Any]:
    return {**serve.model_dump(), "engine": str(engine.resolve())}  # the configs name the engine by its path


@cache
def _contract() -> Mapping[str, Any]:
    models: dict[str, Any] = json.loads(_CONTRACT.read_text(encoding="utf-8"))["models"]
    return models


def _model(name: str, serve: ServeRecipe, backend: str = "") -> ModelConfig:
    config = json_format.ParseDict(_contract()[name], ModelConfig())
    config.name = name
    config.backend = backend
    config.max_batch_size = serve.triton_max_batch_size
    return config


def _preprocessing(serve: ServeRecipe, tokenizer: Tokenizer) -> ModelConfig:
    config = _model("preprocessing", serve, "python")
    _set_parameters(config, tokenizer_dir=str(_TOKENIZER_FROM_MODEL), add_special_tokens="False")
    if tokenizer.chat_template is not None:
        # Beyond upstream: lets a client render a conversation with nothing but the server's address.
        config.parameters["chat_template"].string_value = tokenizer.chat_template
    _set_instances(config, serve.preprocessing_instance_count)
    _set_batching(config, serve)
    return config


def _tensorrt_llm(serve: ServeRecipe, engine: Path, builder: Builder) -> ModelConfig:
    config = _model("tensorrt_llm", serve, _BACKENDS[builder])
    cap = serve.max_tokens_in_paged_kv_cache
    _set_parameters(
        config,
        max_beam_width="1",
        gpt_model_type="inflight_fused_batching",
        gpt_model_path=str(engine),
        max_tokens_in_paged_kv_cache="" if cap is None else str(cap),
        batch_scheduler_policy=serve.batch_scheduler_policy,
        kv_cache_free_gpu_mem_fraction=str(serve.kv_cache_free_gpu_mem_fraction),
        exclude_input_in_output=str(serve.exclude_input_in_output),
        enable_kv_cache_reuse=str(serve.enable_kv_cache_reuse),
        enable_context_fmha_fp32_acc=str(serve.enable_context_fmha_fp32_acc),
        kv_cache_host_memory_bytes=str(serve.kv_cache_host_memory_bytes or ""),
        enable_chunked_context=str(serve.enable_chunked_context),
        tokenizer_dir=str(_TOKENIZER_FROM_MODEL),
    )
    config.model_transaction_policy.decoupled = True
    _set_instances(config, 1)
    _set_batching(config, serve)
    return config


def _postprocessing(serve: ServeRecipe) -> ModelConfig:
    config = _model("postprocessing", serve, "python")
    _set_parameters(
        config, tokenizer_dir=str(_TOKENIZER_FROM_MODEL), skip_special_tokens=str(serve.skip_special_tokens)
    )
    _set_instances(config, serve.postprocessing_instance_count)
    # Without it, the pieces of a stream overtake each other.
    config.dynamic_batching.preserve_ordering = True
    return config


def _set_parameters(config: ModelConfig, **values: str) -> None:
    for key, value in values.items():
        assert key in config.parameters, key
        config.parameters[key].string_value = value


def _set_instances(config: ModelConfig, count: int) -> None:
    config.instance_group.add(count=count, kind=ModelInstanceGroup.KIND_CPU)


def _set_batching(config: ModelConfig, serve: ServeRecipe) -> None:
    config.dynamic_batching.preferred_batch_size.append(serve.triton_max_batch_size)
    config.dynamic_batching.default_queue_policy.max_queue_size = serve.max_queue_size

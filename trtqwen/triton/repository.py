"""Writes the model repository of an engine: five models in the tensor contract of upstream's in-flight batching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from trtqwen.artifact.manifest import Manifest, read_manifest
from trtqwen.artifact.names import CONFIG, MODEL_CONFIG, TOKENIZER_DIRECTORY, tokenizer_directory
from trtqwen.artifact.stage import BuildEvents, Stage
from trtqwen.diagnostics import InputError
from trtqwen.engine.config import Backend, read_engine_config
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import TORCH_SERVING, ServeRecipe
from trtqwen.triton.contract import model_config, model_names
from trtqwen.triton.model_parameters import HOLDS_CHARACTERS

_MODELS = Path(__file__).with_name("models")
_BACKENDS: dict[Backend, str] = {
    "torch": "python",
    "vllm": "python",
    "llmapi": "python",
    "tensorrt_llm": "tensorrtllm",
}

# The repository carries its own copy of the tokenizer: building the engine again under a running server does not
# change it, and the manifest accounts for it. Models find it relative to their directory, so a repository can move.
_TOKENIZER_INFO = Path("tensorrt_llm", "1", "xgrammar_tokenizer_info.json")
_TOKENIZER_FROM_MODEL = tokenizer_directory(Path(".."))
_RECV_POLL_MS = 1


@dataclass(frozen=True)
class RepositoryPlan:
    """The plan of a repository.

    Attributes:
        engine: absolute path of the engine directory.
        engine_key: its manifest key.
        configs: each model's config, by model name.
        python_models: the models that get a `model.py`.
        guided: whether TensorRT-LLM's guided decoding is on, which needs a file about the tokenizer.
    """

    engine: Path
    engine_key: str
    configs: Mapping[str, ModelConfig]
    python_models: tuple[str, ...]
    guided: bool


def plan_repository(engine: Path, serve: ServeRecipe, output: Path | None = None) -> RepositoryPlan:
    """Plan every model's config for a finished engine.

    Args:
        output: where the repository will lie. TensorRT-LLM's guided decoding reads a file in it by its absolute path,
            and is off without.

    Raises:
        InputError: if the engine is not finished or has no tokenizer.
    """
    engine = engine.resolve()
    manifest = read_manifest(engine, "engine")
    built = _built(engine)
    if not (engine / TOKENIZER_DIRECTORY).is_dir():
        raise InputError(
            f"{engine / TOKENIZER_DIRECTORY}: is missing, but Triton's text models need it",
            "put tokenizer.json and tokenizer_config.json next to the model's weights and build again",
        )
    tokenizer = Tokenizer(engine / TOKENIZER_DIRECTORY)
    configs = {name: model_config(name, built.release, built.logits_dtype) for name in model_names()}
    for config in configs.values():
        config.max_batch_size = serve.triton_max_batch_size
    _preprocessing(configs["preprocessing"], serve, engine, tokenizer)
    _tensorrt_llm(configs["tensorrt_llm"], serve, engine, built)
    _postprocessing(configs["postprocessing"], serve, built)
    _bls(configs["tensorrt_llm_bls"])
    configs["ensemble"].platform = "ensemble"
    # Upstream has it from 0.19.
    guided = built.backend == "tensorrt_llm" and "guided_decoding_backend" in configs["tensorrt_llm"].parameters
    if guided and output is not None:
        _set_parameters(
            configs["tensorrt_llm"],
            guided_decoding_backend="xgrammar",
            xgrammar_tokenizer_info_path=str(output.resolve() / _TOKENIZER_INFO),
        )
    python_models = tuple(name for name, config in configs.items() if config.backend == "python")
    return RepositoryPlan(engine, manifest.key, configs, python_models, guided)


@dataclass
class RepositoryStage(Stage):
    """The last stage of a build.

    Args:
        engine: the engine's directory; it may not exist before `run`.
        engine_key: its manifest key, by which the repository names it.
    """

    name = "repository"
    section = "serve"

    engine: Path
    engine_key: str
    serve: ServeRecipe
    directory: Path

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.engine,)

    def inputs(self) -> dict[str, str]:
        return {"engine": self.engine_key}

    def parameters(self) -> dict[str, Any]:
        return _parameters(self.engine, self.serve)

    def check(self, *, force: bool) -> None:
        """Plan the configs.

        Raises:
            InputError: if the engine is not finished or has no tokenizer.
        """
        self._plan()

    def run(self, directory: Path, events: BuildEvents) -> Mapping[str, str]:
        """Write the models."""
        plan = self._plan()
        for name, config in plan.configs.items():
            version = directory / name / "1"
            version.mkdir(parents=True)
            (directory / name / MODEL_CONFIG).write_text(config_text(config), encoding="utf-8")
            if name in plan.python_models:
                parts = [(_MODELS / f"{part}.py").read_text(encoding="utf-8") for part in ("python_path", name)]
                (version / "model.py").write_text("\n\n".join(parts), encoding="utf-8")
            else:
                # Triton wants a version directory with something in it that no copy or archive drops.
                (version / ".keep").touch()
        shutil.copytree(plan.engine / TOKENIZER_DIRECTORY, tokenizer_directory(directory))
        if plan.guided:
            (directory / _TOKENIZER_INFO).write_text(_tokenizer_info(plan.engine), encoding="utf-8")
        return {}

    def _plan(self) -> RepositoryPlan:
        plan = plan_repository(self.engine, self.serve, self.directory)
        if plan.engine_key != self.engine_key:
            raise InputError(f"{self.engine}: another process has replaced it", "run the command again")
        return plan


def write_repository(engine: Path, serve: ServeRecipe, output: Path, *, force: bool = False) -> Manifest:
    """Write the Triton model repository of a finished engine.

    Raises:
        InputError: if the engine is not finished or has no tokenizer.
        OutputError: if `output` exists and `force` is not set.
    """
    return RepositoryStage(engine, read_manifest(engine, "engine").key, serve, output).make(force=force)


def config_text(config: ModelConfig) -> str:
    """`config.pbtxt` of a config, proved to read back as the same config."""
    text = str(text_format.MessageToString(config, as_utf8=True))
    assert text_format.Parse(text, ModelConfig()) == config
    return text


def _parameters(engine: Path, serve: ServeRecipe) -> dict[str, Any]:
    return {**serve.model_dump(), "engine": str(engine.resolve())}  # the configs name the engine by its path


@dataclass(frozen=True)
class _Built:
    """The properties of an engine on which the configs depend.

    Attributes:
        release: the TensorRT-LLM release that built it, or None.
    """

    backend: Backend
    release: str | None
    logits_dtype: str
    world_size: int


def _built(engine: Path) -> _Built:
    config = read_engine_config(engine)
    raw = json.loads((engine / CONFIG).read_text(encoding="utf-8"))
    logits_dtype = (
        raw["pretrained_config"].get("logits_dtype", "float32") if config.backend == "tensorrt_llm" else "float32"
    )
    return _Built(config.backend, config.version, logits_dtype, config.pretrained_config.mapping.world_size)


def _preprocessing(config: ModelConfig, serve: ServeRecipe, engine: Path, tokenizer: Tokenizer) -> None:
    config.backend = "python"
    _set_parameters(
        config,
        tokenizer_dir=str(_TOKENIZER_FROM_MODEL),
        add_special_tokens=str(tokenizer.adds_tokens),
        gpt_model_path=str(engine),
    )
    if tokenizer.chat_template is not None:
        # Beyond upstream: lets a client render a conversation with nothing but the server's address.
        config.parameters["chat_template"].string_value = tokenizer.chat_template.standalone()
    _set_instances(config, serve.preprocessing_instance_count)
    _set_batching(config, serve)


def _tensorrt_llm(config: ModelConfig, serve: ServeRecipe, engine: Path, built: _Built) -> None:
    config.backend = _BACKENDS[built.backend]
    cap = serve.max_tokens_in_paged_kv_cache
    _set_parameters(
        config,
        max_beam_width="1",
        gpt_model_type="inflight_fused_batching",
        gpt_model_path=str(engine),
        max_tokens_in_paged_kv_cache="" if cap is None else str(cap),
        # vLLM admits a request when its next chunk fits, and recomputes the youngest when blocks run out.
        batch_scheduler_policy="max_utilization" if built.backend == "vllm" else serve.batch_scheduler_policy,
        kv_cache_free_gpu_mem_fraction=str(serve.kv_cache_free_gpu_mem_fraction),
        exclude_input_in_output=str(serve.exclude_input_in_output),
        enable_kv_cache_reuse=str(serve.enable_kv_cache_reuse),
        enable_chunked_context=str(serve.enable_chunked_context),
    )
    if "tokenizer_dir" in config.parameters or built.backend != "tensorrt_llm":  # upstream has it from 0.19
        config.parameters["tokenizer_dir"].string_value = str(_TOKENIZER_FROM_MODEL)
    replicas = serve.replicas if serve.replica_mode == "orchestrator" else 1
    if built.backend == "tensorrt_llm":
        _set_parameters(
            config,
            enable_context_fmha_fp32_acc=str(serve.enable_context_fmha_fp32_acc),
            kv_cache_host_memory_bytes=str(serve.kv_cache_host_memory_bytes or ""),
            gpu_device_ids=_gpu_device_ids(replicas, built.world_size),
        )
        # Upstream documents it and its template lacks it; without it the thread that receives requests never sleeps.
        config.parameters["recv_poll_period_ms"].string_value = str(_RECV_POLL_MS)
    if built.backend == "torch":  # beyond upstream
        for name in TORCH_SERVING:
            config.parameters[name].string_value = str(getattr(serve, name))
    if built.backend != "tensorrt_llm" and "guided_decoding_backend" in config.parameters:  # from 0.19
        _set_parameters(config, guided_decoding_backend="xgrammar")
    config.model_transaction_policy.decoupled = True
    _set_instances(config, replicas)
    _set_batching(config, serve)


def _tokenizer_info(engine: Path) -> str:
    """Return the file of upstream's `generate_xgrammar_tokenizer_info.py` for a tokenizer.

    It has an entry for every row of the engine's padded vocabulary; with fewer entries, masks would be misplaced.
    """
    tokenizer = Tokenizer(engine / TOKENIZER_DIRECTORY)
    backend = tokenizer.resolved.backend
    tokens = {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=True).items()}
    vocab_size = read_engine_config(engine).pretrained_config.vocab_size
    info = {
        "encoded_vocab": [tokens.get(token_id, "") for token_id in range(vocab_size)],
        "tokenizer_str": backend.to_str(),
        "stop_token_ids": list(tokenizer.stop_ids),
    }
    return json.dumps(info, ensure_ascii=False)


def _gpu_device_ids(replicas: int, world_size: int) -> str:
    """One group per replica, one GPU per rank: `0,1;2,3`."""
    groups = (range(replica * world_size, (replica + 1) * world_size) for replica in range(replicas))
    return ";".join(",".join(map(str, group)) for group in groups)


def _postprocessing(config: ModelConfig, serve: ServeRecipe, built: _Built) -> None:
    config.backend = "python"
    _set_parameters(
        config, tokenizer_dir=str(_TOKENIZER_FROM_MODEL), skip_special_tokens=str(serve.skip_special_tokens)
    )
    if built.backend == "tensorrt_llm":
        if serve.postprocessing_instance_count > 1:
            raise InputError(
                (
                    f"serve.postprocessing_instance_count: {serve.postprocessing_instance_count} processes "
                    "cannot keep the characters together that TensorRT-LLM splits over responses"
                ),
                "set it to 1",
            )
        # Beyond upstream: the C++ backend sends tokens as they come, the embedded engine whole characters.
        config.parameters[HOLDS_CHARACTERS].string_value = "True"
    _set_instances(config, serve.postprocessing_instance_count)
    if serve.postprocessing_instance_count > 1:
        config.dynamic_batching.preserve_ordering = True  # else the pieces of a stream overtake each other
    else:
        # One instance keeps the order by itself. A batcher rejects requests of a client that has left, as errors of a
        # step; an ensemble whose step fails while another one is scheduled crashes Triton before 26.05 (core 483).
        config.ClearField("dynamic_batching")


def _bls(config: ModelConfig) -> None:
    config.backend = "python"
    _set_parameters(config, tensorrt_llm_model_name="tensorrt_llm")
    config.model_transaction_policy.decoupled = True
    _set_instances(config, 1)  # one instance serves many requests at a time, unlike upstream's


def _set_parameters(config: ModelConfig, **values: str) -> None:
    for key, value in values.items():
        assert key in config.parameters, key
        config.parameters[key].string_value = value


def _set_instances(config: ModelConfig, count: int) -> None:
    config.instance_group.add(count=count, kind=ModelInstanceGroup.KIND_CPU)


def _set_batching(config: ModelConfig, serve: ServeRecipe) -> None:
    config.dynamic_batching.preferred_batch_size.append(serve.triton_max_batch_size)
    config.dynamic_batching.default_queue_policy.max_queue_size = serve.max_queue_size

"""The `parameters` of a Triton model: strings in the JSON config that the python backend passes to a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtqwen.artifact.names import MODEL_CONFIG
from trtqwen.diagnostics import InputError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.recipe import TORCH_SERVING

FROM_PROGRAM = "from_program"  # parameter of a request that another model sends: the id that its own client gave
HOLDS_CHARACTERS = "holds_characters"  # parameter of postprocessing, beyond upstream's
FILES_VERIFIED = "TRTQWEN_FILES_VERIFIED"  # set by the process that compared the digests of engine and repository
HEARTBEAT = "TRTQWEN_HEARTBEAT"  # a file that `tensorrt_llm` touches whenever its engine answers between two steps
ENGINE_DEATH = "TRTQWEN_ENGINE_DEATH"  # environment variable: where `tensorrt_llm` writes why its engine stopped
GRPC_ADDRESS = "TRTQWEN_GRPC_ADDRESS"  # host:port at which the server's models reach its gRPC endpoint
VLLM_SOCKET = "TRTQWEN_VLLM_SOCKET"  # where the vLLM listens that was started for this server
VLLM_PID = "TRTQWEN_VLLM_PID"  # the process id of its guardian


@dataclass(frozen=True)
class EngineParameters:
    """The parameters of the model `tensorrt_llm`.

    Attributes:
        cancellation_check_period, stats_check_period: seconds.
    """

    engine: Path
    tokenizer: Path
    executor: ExecutorConfig
    exclude_input_in_output: bool
    cancellation_check_period: float
    stats_check_period: float


def read_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The parameters of a model from the arguments of its `initialize`; empty ones, as upstream, are not set."""
    parameters = json.loads(args["model_config"])["parameters"]
    return {key: value["string_value"] for key, value in parameters.items() if value["string_value"]}


def tokenizer_path(args: Mapping[str, str], parameters: Mapping[str, str]) -> Path:
    """The tokenizer's directory; a relative one is relative to the model's directory."""
    return Path(args["model_repository"]) / parameters["tokenizer_dir"]


def flag(parameters: Mapping[str, str], key: str, default: bool) -> bool:
    """A boolean parameter, read as upstream's python models do: `1` or `true` in any case is true."""
    return parameters[key].lower() in ("1", "true") if key in parameters else default


def repository_parameters(repository: Path) -> EngineParameters:
    """The parameters of `tensorrt_llm` in a finished repository.

    Raises:
        InputError: naming the parameter, if a value cannot be used.
    """
    # Loads gRPC. The models of a repository read parameters too, and start without it.
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    directory = repository / "tensorrt_llm"
    config = text_format.Parse((directory / MODEL_CONFIG).read_text(encoding="utf-8"), ModelConfig())
    content = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return engine_parameters({"model_config": json.dumps(content), "model_repository": str(directory)})


def engine_parameters(args: Mapping[str, str]) -> EngineParameters:
    """Read the parameters of `tensorrt_llm`.

    Raises:
        InputError: naming the parameter, if a value cannot be used.
    """
    parameters = read_parameters(args)
    return EngineParameters(
        engine=Path(parameters["gpt_model_path"]),
        tokenizer=tokenizer_path(args, parameters),
        executor=_executor_config(parameters, json.loads(args["model_config"])),
        exclude_input_in_output=flag(parameters, "exclude_input_in_output", False),
        cancellation_check_period=_milliseconds(parameters, "cancellation_check_period_ms"),
        stats_check_period=_milliseconds(parameters, "stats_check_period_ms"),
    )


def _executor_config(parameters: Mapping[str, str], config: Mapping[str, Any]) -> ExecutorConfig:
    given = {
        key: parameters[key]
        for key in (
            "batch_scheduler_policy",
            "enable_chunked_context",
            "enable_kv_cache_reuse",
            "max_tokens_in_paged_kv_cache",
            "kv_cache_free_gpu_mem_fraction",
            *TORCH_SERVING,
        )
        if key in parameters
    }
    queue = config.get("dynamic_batching", {}).get("default_queue_policy", {}).get("max_queue_size", 0)
    try:
        return ExecutorConfig.model_validate({**given, "max_queue_size": queue})
    except ValidationError as problem:
        first = problem.errors()[0]
        key, value = first["loc"][0], first["input"]
        raise InputError(f"config.pbtxt: parameter {key} cannot be {value!r}", "write the repository again") from None


def _milliseconds(parameters: Mapping[str, str], key: str) -> float:
    text = parameters.get(key, "0")
    if not text.isdecimal():
        raise InputError(f"config.pbtxt: parameter {key} cannot be {text!r}", "give whole milliseconds")
    return (int(text) or 100) / 1000

"""The parameters of the model `tensorrt_llm`: where its engine is, and how the engine runs.

The models of repositories that trtqwen 0.1.0 wrote import from here what `model_parameters` defines.
"""

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
from trtqwen.triton.model_parameters import (
    ENGINE_DEATH,
    FILES_VERIFIED,
    FROM_PROGRAM,
    GRPC_ADDRESS,
    HEARTBEAT,
    HOLDS_CHARACTERS,
    VLLM_PID,
    VLLM_SOCKET,
    flag,
    read_parameters,
    tokenizer_path,
)

__all__ = [
    "ENGINE_DEATH",
    "FILES_VERIFIED",
    "FROM_PROGRAM",
    "GRPC_ADDRESS",
    "HEARTBEAT",
    "HOLDS_CHARACTERS",
    "VLLM_PID",
    "VLLM_SOCKET",
    "EngineParameters",
    "engine_parameters",
    "flag",
    "read_parameters",
    "repository_parameters",
    "tokenizer_path",
]


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

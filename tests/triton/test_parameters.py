"""A model's parameters, from the config that the repository carries to what the engine is started with."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from google.protobuf import json_format

from trtqwen.diagnostics import InputError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.recipe import ServeRecipe
from trtqwen.triton.parameters import engine_parameters
from trtqwen.triton.repository import plan_repository

# What the models of a repository import that trtqwen 0.1.0 wrote: they are served after an upgrade, too.
IMPORTS_OF_0_1_0 = {
    "trtqwen.diagnostics": "EngineError RequestError TrtQwenError",
    "trtqwen.engine.config": "read_engine_config",
    "trtqwen.hf.tokenizer": "Tokenizer",
    "trtqwen.triton.bls": "BlsSettings answer stop",
    "trtqwen.triton.contract": "EXTENSIONS",
    "trtqwen.triton.engines": "open_engine",
    "trtqwen.triton.loopback": "Loopback",
    "trtqwen.triton.metrics": "INPUT_LENGTH LENGTH_BUCKETS LENGTH_LABEL OUTPUT_LENGTH",
    "trtqwen.triton.parameters": (
        "ENGINE_DEATH FILES_VERIFIED FROM_PROGRAM GRPC_ADDRESS HEARTBEAT HOLDS_CHARACTERS VLLM_PID VLLM_SOCKET "
        "engine_parameters flag read_parameters tokenizer_path"
    ),
    "trtqwen.triton.service": "EngineService",
    "trtqwen.triton.tensors": "Limits",
    "trtqwen.triton.text": "HoldingDecoder decode_response encode_request",
    "trtqwen.vllm.server": "VllmPlace",
}


def arguments(engine: Path, serve: ServeRecipe, **parameters: str) -> dict[str, str]:
    """What Triton hands to `initialize`."""
    config = plan_repository(engine, serve).configs["tensorrt_llm"]
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    text = json_format.MessageToJson(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {"model_config": text, "model_repository": "/repository/tensorrt_llm"}


def test_serve_settings_reach_the_executor(bundled_engine: Callable[..., Path]) -> None:
    serve = ServeRecipe(
        batch_scheduler_policy="max_utilization",
        enable_chunked_context=False,
        max_tokens_in_paged_kv_cache=2048,
        max_queue_size=5,
        exclude_input_in_output=False,
    )
    settings = engine_parameters(arguments(bundled_engine(), serve, stats_check_period_ms="250"))
    assert settings.executor == ExecutorConfig(
        batch_scheduler_policy="max_utilization",
        enable_chunked_context=False,
        max_tokens_in_paged_kv_cache=2048,
        max_queue_size=5,
    )
    assert settings.engine == bundled_engine().resolve()
    assert not settings.exclude_input_in_output
    assert (settings.cancellation_check_period, settings.stats_check_period) == (0.1, 0.25)


def test_defaults_are_left_to_the_executor(bundled_engine: Callable[..., Path]) -> None:
    settings = engine_parameters(arguments(bundled_engine(), ServeRecipe()))
    assert settings.executor == ExecutorConfig()
    assert settings.exclude_input_in_output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_scheduler_policy", "static_batch"),
        ("max_tokens_in_paged_kv_cache", "many"),
        ("stats_check_period_ms", "-1"),
    ],
)
def test_a_value_that_cannot_be_is_named(bundled_engine: Callable[..., Path], key: str, value: str) -> None:
    with pytest.raises(InputError, match=f"parameter {key} cannot be '{value}'"):
        engine_parameters(arguments(bundled_engine(), ServeRecipe(), **{key: value}))


def test_the_arguments_are_as_tritons(bundled_engine: Callable[..., Path]) -> None:
    config = json.loads(arguments(bundled_engine(), ServeRecipe())["model_config"])
    assert config["parameters"]["decoding_mode"] == {"string_value": ""}


def test_models_that_0_1_0_wrote_find_what_they_import() -> None:
    missing = {
        f"{module}.{name}"
        for module, names in IMPORTS_OF_0_1_0.items()
        for name in names.split()
        if not hasattr(import_module(module), name)
    }
    assert not missing

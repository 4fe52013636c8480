"""A model's parameters, from the config that the repository carries to what the engine is started with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import json_format

from trtqwen.diagnostics import InputError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.recipe import ServeRecipe
from trtqwen.triton.engine_parameters import engine_parameters
from trtqwen.triton.repository import plan_repository


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

"""Upstream's in-flight batching models as data: tensors, parameters and ensemble steps, in each release's names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from trtqwen.diagnostics import RequestError

if TYPE_CHECKING:  # loads gRPC: the models of a repository take a name from here, and start without it
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# Parameter of a request: JSON, what it asks for beyond upstream's tensors; see docs/extensions.md.
EXTENSIONS = "trtqwen"
_FILE = Path(__file__).with_name("contract.json")


def model_names() -> tuple[str, ...]:
    """The models of a repository."""
    return tuple(_content()["models"])


def model_config(name: str, release: str | None = None, logits_dtype: str = "float32") -> ModelConfig:
    """Return upstream's config of a model with all parameters unset.

    Args:
        release: whose names it uses, such as 0.18.2; None is the newest known.
        logits_dtype: of the engine: float32 or float16, the two that upstream's backends send.
    """
    from google.protobuf import json_format
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

    config: ModelConfig = json_format.ParseDict(_content()["models"][name], ModelConfig())
    config.name = name
    for tensor in (*config.input, *config.output):
        if tensor.name in _content()["logits"] and logits_dtype == "float16":
            tensor.data_type = DataType.TYPE_FP16
    for change in _content()["history"]:
        if release is not None and _version(release) < _version(change["since"]):
            _undo(config, change)
    return config


def refuse_unserved(inputs: Mapping[str, npt.NDArray[Any]], needs: Mapping[str, str]) -> None:
    """Refuse tensors of the contract that trtqwen does not serve.

    Args:
        needs: by the tensor's name, what it needs.

    Raises:
        RequestError: naming the first such tensor with a value other than zero.
    """
    for name, need in needs.items():
        if name in inputs and inputs[name].any():
            raise RequestError(f"{name}: needs {need}, which this server does not have", "leave the tensor out")


def older_names() -> dict[str, str]:
    """Return the older names of tensors, by their names in the newest release."""
    return {new: old for change in _content()["history"] for old, new in change["renamed"].items()}


@cache
def step_maps(model: str) -> tuple[dict[str, str], dict[str, str]]:
    """A step of the ensemble: its model's input and output tensors by the ensemble's name, newest release."""
    for step in model_config("ensemble").ensemble_scheduling.step:
        if step.model_name == model:
            return dict(step.input_map), dict(step.output_map)
    raise KeyError(model)


def _undo(config: ModelConfig, change: Mapping[str, Any]) -> None:
    """Undo the changes of a release."""
    added, renamed = set(change["added_tensors"]), {new: old for old, new in change["renamed"].items()}
    for tensors in (config.input, config.output):
        kept = [tensor for tensor in tensors if tensor.name not in added]
        del tensors[:]
        tensors.extend(kept)
        for tensor in tensors:
            tensor.name = renamed.get(tensor.name, tensor.name)
    for step in config.ensemble_scheduling.step:
        for names in (step.input_map, step.output_map):
            kept_names = {inner: outer for inner, outer in names.items() if inner not in added}
            names.clear()
            names.update(
                {renamed.get(inner, inner): renamed.get(outer, outer) for inner, outer in kept_names.items()}
            )
    _drop(config.parameters, change["added_parameters"].get(config.name, ()))
    for new, old in renamed.items():
        if new in config.parameters:
            config.parameters[old].CopyFrom(config.parameters[new])
            del config.parameters[new]


def _drop(parameters: Any, names: Iterable[str]) -> None:
    for name in names:
        del parameters[name]


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:2])


@cache
def _content() -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return content

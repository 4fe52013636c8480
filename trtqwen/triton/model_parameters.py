"""The `parameters` of a Triton model: strings in the JSON config that the python backend passes to a model.

Each of the four models starts an interpreter, and all of them load this module: it loads little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

FROM_PROGRAM = "from_program"  # parameter of a request that another model sends: the id that its own client gave
HOLDS_CHARACTERS = "holds_characters"  # parameter of postprocessing, beyond upstream's
FILES_VERIFIED = "TRTQWEN_FILES_VERIFIED"  # set by the process that compared the digests of engine and repository
HEARTBEAT = "TRTQWEN_HEARTBEAT"  # a file that `tensorrt_llm` touches whenever its engine answers between two steps
ENGINE_DEATH = "TRTQWEN_ENGINE_DEATH"  # environment variable: where `tensorrt_llm` writes why its engine stopped
GRPC_ADDRESS = "TRTQWEN_GRPC_ADDRESS"  # host:port at which the server's models reach its gRPC endpoint
VLLM_SOCKET = "TRTQWEN_VLLM_SOCKET"  # where the vLLM listens that was started for this server
VLLM_PID = "TRTQWEN_VLLM_PID"  # the process id of its guardian


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

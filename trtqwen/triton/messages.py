"""Tensors in and out of Triton's gRPC messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

Array = npt.NDArray[Any]
# Option of a channel: gRPC refuses messages above 4 MiB, and logits and log probabilities of a prompt take more.
ANY_SIZE = ("grpc.max_receive_message_length", -1)


def infer_request(
    model: str,
    request_id: str,
    inputs: Mapping[str, Array],
    outputs: Sequence[str] = (),
    parameters: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """A ModelInferRequest with these tensors in.

    Args:
        outputs: requested tensors of the responses; empty requests all.
        parameters: texts for the model, by name.
    """
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, text in parameters.items():
        request.parameters[name].string_param = text
    for name in outputs:
        request.outputs.add(name=name)
    _add(request.inputs, request.raw_input_contents, inputs)
    return request


def infer_response(outputs: Mapping[str, Array]) -> Any:
    """A ModelInferResponse with these tensors in."""
    response = service_pb2.ModelInferResponse()
    _add(response.outputs, response.raw_output_contents, outputs)
    return response


def input_arrays(request: Any) -> dict[str, Array]:
    """The tensors of a ModelInferRequest by name; texts are bytes."""
    return _arrays(request.inputs, request.raw_input_contents)


def output_arrays(response: Any) -> dict[str, Array]:
    """The tensors of a ModelInferResponse by name; texts are bytes."""
    return _arrays(response.outputs, response.raw_output_contents)


def _add(tensors: Any, contents: Any, values: Mapping[str, Array]) -> None:
    for name, value in values.items():
        tensors.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
        contents.append(serialize_byte_tensor(value).item() if value.dtype == np.object_ else value.tobytes())


def _arrays(tensors: Any, contents: Any) -> dict[str, Array]:
    arrays = {}
    for tensor, raw in zip(tensors, contents, strict=True):
        flat = (
            deserialize_bytes_tensor(raw)
            if tensor.datatype == "BYTES"
            else np.frombuffer(raw, triton_to_np_dtype(tensor.datatype))
        )
        arrays[tensor.name] = flat.reshape(tuple(tensor.shape))
    return arrays

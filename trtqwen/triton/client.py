"""Streams an answer from a Triton server over gRPC, from the model `ensemble`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor

from trtqwen.errors import ServerError
from trtqwen.hf.tokenizer import render_chat
from trtqwen.triton.contract import older_names

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, by the ensemble's tensor names; what is None is left to the server."""

    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None


@dataclass(frozen=True)
class Piece:
    """Part of an answer.

    Attributes:
        num_tokens: how many tokens it was; TensorRT-LLM's C++ backend and older releases do not tell, and it is 0.
    """

    text: str
    num_tokens: int


_DTYPES: dict[str, type[np.generic]] = {"top_k": np.int32, "min_tokens": np.int32, "seed": np.uint64}


def stream(
    url: str,
    prompt: str,
    max_tokens: int,
    *,
    sampling: SamplingOptions | None = None,
    chat: bool = True,
    request_id: str | None = None,
) -> Iterator[Piece]:
    """Yield an answer piece by piece. Closing the iterator early cancels the request.

    Args:
        url: host:port of Triton's gRPC endpoint.
        chat: render the prompt as a user's message by the model's chat template, if it has one.
        request_id: unique on the server; made up if not given.

    Raises:
        ServerError: if the server cannot be reached or refuses the request.
        InputError: if the chat template refuses the prompt.
    """
    request_id = request_id or uuid.uuid4().hex
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        finished = False
        try:
            text = _rendered(stub, prompt) if chat else prompt
            inputs = _as_known(stub, _inputs(text, max_tokens, sampling or SamplingOptions()))
            request = _request("ensemble", request_id, inputs)
            for reply in stub.ModelStreamInfer(iter([request])):
                if reply.error_message:
                    finished = True
                    raise ServerError(f"{url}: the server refused the request: {reply.error_message}")
                piece = _piece(reply.infer_response)
                if piece.text or piece.num_tokens:
                    yield piece
            finished = True
        except grpc.RpcError as problem:
            finished = True
            raise _as_server_error(url, problem) from None
        finally:
            if not finished:
                _stop(stub, request_id)


def _rendered(stub: Any, prompt: str) -> str:
    config = stub.ModelConfig(service_pb2.ModelConfigRequest(name="preprocessing")).config
    template = config.parameters["chat_template"].string_value
    return render_chat(template, [{"role": "user", "content": prompt}]) if template else prompt


def _inputs(text: str, max_tokens: int, sampling: SamplingOptions) -> dict[str, Array]:
    inputs: dict[str, Array] = {
        "text_input": np.array([[text.encode()]], np.object_),
        "max_tokens": np.array([[max_tokens]], np.int32),
        "stream": np.array([[True]]),
        "return_num_output_tokens": np.array([[True]]),
    }
    for name, value in vars(sampling).items():
        if value is not None:
            inputs[name] = np.array([[value]], _DTYPES.get(name, np.float32))
    return inputs


def _as_known(stub: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs by the names of the release that the server's engine is from; counts only where it has them."""
    metadata = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="ensemble"))
    known = {tensor.name for tensor in metadata.inputs}
    older = older_names()
    named = {name if name in known else older.get(name, name): value for name, value in inputs.items()}
    return {name: value for name, value in named.items() if name in known or name != "return_num_output_tokens"}


def _request(model: str, request_id: str, inputs: Mapping[str, Array]) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, value in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
        raw = serialize_byte_tensor(value).item() if value.dtype == np.object_ else value.tobytes()
        request.raw_input_contents.append(raw)
    return request


def _piece(response: Any) -> Piece:
    raw = {
        output.name: content for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    text = b"".join(deserialize_bytes_tensor(raw.get("text_output", b"")))
    counts = np.frombuffer(raw.get("num_output_tokens", b""), np.int32)
    return Piece(text.decode(), int(counts.sum()))


def _stop(stub: Any, request_id: str) -> None:
    """Ask the engine itself: Triton's ensemble does not pass a client's cancellation on to its steps."""
    inputs = {
        "input_ids": np.zeros((1, 1), np.int32),
        "input_lengths": np.ones((1, 1), np.int32),
        "request_output_len": np.ones((1, 1), np.int32),
        "stop": np.array([[True]]),
    }
    try:
        for _ in stub.ModelStreamInfer(iter([_request("tensorrt_llm", request_id, inputs)])):
            pass
    except grpc.RpcError:
        pass  # the server has gone, and the request with it


def _as_server_error(url: str, problem: grpc.RpcError) -> ServerError:
    if problem.code() is grpc.StatusCode.UNAVAILABLE:
        return ServerError(f"{url}: no Triton server answers; start one with `trtqwen serve` or correct the address")
    return ServerError(f"{url}: the server refused the request: {problem.details()}")

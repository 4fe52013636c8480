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

from trtqwen.diagnostics import InputError, ServerError
from trtqwen.hf.chat_template import DEFAULT, ChatTemplate
from trtqwen.triton.contract import older_names
from trtqwen.triton.messages import infer_request, output_arrays
from trtqwen.triton.streams import read_rest

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
_CONTROL_SECONDS = 5  # for what a server answers without the engine


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters, by the ensemble's tensor names. None leaves a parameter to the server."""

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
        num_tokens: number of tokens; 0 with TensorRT-LLM's C++ backend and older releases, which do not report it.
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
    timeout: float = 300,
) -> Iterator[Piece]:
    """Yield an answer piece by piece. Closing the iterator early ends the request in the engine.

    Args:
        url: host:port of Triton's gRPC endpoint.
        chat: render the prompt as a user's message by the model's chat template.
        request_id: unique on the server; made up if not given.
        timeout: seconds for the whole answer.

    Raises:
        ServerError: if the server cannot be reached, refuses the request or exceeds the timeout.
        InputError: if the prompt is not Unicode text, the chat template refuses it, or there is none.
    """
    request_id = request_id or uuid.uuid4().hex
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        finished, call = False, None
        try:
            text = _rendered(stub, prompt) if chat else prompt
            inputs = _as_known(stub, _inputs(text, max_tokens, sampling or SamplingOptions()))
            request = infer_request("ensemble", request_id, inputs)
            call = stub.ModelStreamInfer(iter([request]), timeout=timeout)
            for reply in call:
                if reply.error_message:
                    finished = True
                    read_rest(call)
                    raise ServerError(f"{url}: the server refused the request: {reply.error_message}")
                piece = _piece(reply.infer_response)
                if piece.text or piece.num_tokens:
                    yield piece
            finished = True
        except grpc.RpcError as problem:
            finished = problem.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            raise server_error(url, problem) from None
        finally:
            if not finished:
                _stop(stub, request_id)
                if call is not None:
                    read_rest(call)


def _rendered(stub: Any, prompt: str) -> str:
    request = service_pb2.ModelConfigRequest(name="preprocessing")
    config = stub.ModelConfig(request, timeout=_CONTROL_SECONDS).config
    template = config.parameters["chat_template"].string_value
    if not template:
        raise InputError(
            "the model has no chat template, so a prompt cannot be rendered as a user's message",
            "pass --raw to have the prompt completed as it is",
        )
    return ChatTemplate({DEFAULT: template}).render([{"role": "user", "content": prompt}])


def _inputs(text: str, max_tokens: int, sampling: SamplingOptions) -> dict[str, Array]:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not Unicode text", "pass it as UTF-8") from None
    inputs: dict[str, Array] = {
        "text_input": np.array([[encoded]], np.object_),
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
    metadata = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="ensemble"), timeout=_CONTROL_SECONDS)
    known = {tensor.name for tensor in metadata.inputs}
    older = older_names()
    named = {name if name in known else older.get(name, name): value for name, value in inputs.items()}
    return {name: value for name, value in named.items() if name in known or name != "return_num_output_tokens"}


def _piece(response: Any) -> Piece:
    outputs = output_arrays(response)
    counts = outputs.get("num_output_tokens")
    return Piece(answer_text(outputs), 0 if counts is None else int(counts.sum()))


def answer_text(outputs: Tensors) -> str:
    """The text of a reply of `ensemble`; invalid UTF-8 becomes U+FFFD."""
    return "".join(text.decode("utf-8", "replace") for text in outputs.get("text_output", np.empty(0)).reshape(-1))


def _stop(stub: Any, request_id: str) -> None:
    """Stop the request in the engine: Triton's ensemble does not pass a client's cancellation on to its steps."""
    inputs = {
        "input_ids": np.zeros((1, 1), np.int32),
        "input_lengths": np.ones((1, 1), np.int32),
        "request_output_len": np.ones((1, 1), np.int32),
        "stop": np.array([[True]]),
    }
    request = infer_request("tensorrt_llm", request_id, inputs)
    try:
        for _ in stub.ModelStreamInfer(iter([request]), timeout=_CONTROL_SECONDS):
            pass
    except grpc.RpcError:
        pass  # the server has ended or hangs, and the request with it


def server_error(url: str, problem: grpc.RpcError) -> ServerError:
    """Return the error of a failed call."""
    if problem.code() is grpc.StatusCode.UNAVAILABLE:
        return ServerError(
            f"{url}: no Triton server answers", "start one with `trtqwen serve` or correct the address"
        )
    if problem.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServerError(f"{url}: the server did not answer in time", "check its log, or allow more time")
    return ServerError(f"{url}: the server refused the request: {problem.details()}")

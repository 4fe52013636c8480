"""A running server as the live checks talk to it: tensors over gRPC, a deadline for each request, its gauges."""

from __future__ import annotations

import re
import urllib.request
import uuid
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

from trtqwen.errors import ServerError

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
_DTYPES: dict[str, type[np.generic]] = {"seed": np.uint64, "temperature": np.float32, "top_p": np.float32}


def chat_prompt(question: str) -> str:
    """A question in Qwen's ChatML."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


class Endpoint:
    """One Triton server; use as a context manager.

    Args:
        url, metrics: host:port of its gRPC and metrics endpoints.
        deadline: seconds for a whole request.
    """

    def __init__(self, url: str, metrics: str, deadline: float = 60) -> None:
        self._url = url
        self._metrics = metrics
        self._deadline = deadline
        self._channel = grpc.insecure_channel(url, options=[("grpc.max_receive_message_length", -1)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def alive(self) -> bool:
        """Whether a Triton answers at all."""
        try:
            return bool(self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=5).live)
        except grpc.RpcError:
            return False

    def text(self, prompt: str, max_tokens: int, **options: float) -> Iterator[str]:
        """The pieces of an answer from `ensemble`, as they come. Closing the iterator cancels.

        Raises:
            ServerError: if the server refuses, or does not answer in time.
        """
        inputs: dict[str, Array] = {
            "text_input": np.array([[prompt.encode()]], np.object_),
            "max_tokens": np.array([[max_tokens]], np.int32),
            "stream": np.array([[True]]),
            **{name: np.array([[value]], _DTYPES.get(name, np.int32)) for name, value in options.items()},
        }
        for outputs in self._stream("ensemble", inputs):
            yield "".join(piece.decode("utf-8", "replace") for piece in outputs["text_output"].reshape(-1))

    def encode(self, prompt: str) -> tuple[list[int], int]:
        """The prompt's token ids, and the id that ends its answer, from `preprocessing`."""
        inputs = {"QUERY": np.array([[prompt.encode()]], np.object_), "REQUEST_OUTPUT_LEN": np.array([[1]], np.int32)}
        request = _request("preprocessing", inputs)
        try:
            outputs = _outputs(self._stub.ModelInfer(request, timeout=self._deadline))
        except grpc.RpcError as problem:
            raise self._error(problem) from None
        return outputs["INPUT_ID"].reshape(-1).tolist(), int(outputs["OUT_END_ID"].reshape(-1)[0])

    def tokens(self, ids: list[int], max_tokens: int, **options: int) -> Generator[list[int]]:
        """The token ids of an answer from `tensorrt_llm`, greedily, as they come. Closing the iterator cancels."""
        inputs: dict[str, Array] = {
            "input_ids": np.array([ids], np.int32),
            "input_lengths": np.array([[len(ids)]], np.int32),
            "request_output_len": np.array([[max_tokens]], np.int32),
            "streaming": np.array([[True]]),
            **{name: np.array([[value]], np.int32) for name, value in options.items()},
        }
        for outputs in self._stream("tensorrt_llm", inputs):
            if "output_ids" in outputs:
                yield outputs["output_ids"].reshape(-1).tolist()

    def gauges(self) -> dict[str, float]:
        """The engine's gauges by `family/value of the label that is neither model nor version`.

        Raises:
            ServerError: if there are none to be had.
        """
        try:
            with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=5) as response:
                text = response.read().decode()
        except (OSError, ValueError):
            raise ServerError(f"{self._metrics}: shows no metrics; name Triton's metrics address") from None
        gauges = {}
        for family, labels, value in re.findall(r"^nv_trt_llm_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            label = next((v for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k not in ("model", "version")), "")
            gauges[f"{family}/{label}"] = float(value)
        return gauges

    def _stream(self, model: str, inputs: Tensors) -> Iterator[dict[str, Array]]:
        call = self._stub.ModelStreamInfer(iter([_request(model, inputs)]), timeout=self._deadline)
        try:
            for reply in call:
                if reply.error_message:
                    raise ServerError(f"{self._url}: {model} refused the request: {reply.error_message}")
                yield _outputs(reply.infer_response)
        except grpc.RpcError as problem:
            raise self._error(problem) from None
        finally:
            call.cancel()

    def _error(self, problem: grpc.RpcError) -> ServerError:
        if problem.code() is grpc.StatusCode.UNAVAILABLE:
            return ServerError(f"{self._url}: no Triton server answers; start one, and name its gRPC address")
        if problem.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServerError(f"{self._url}: no answer within {self._deadline:g} s; look at the server's log")
        return ServerError(f"{self._url}: the server refused the request: {problem.details()}")


def _request(model: str, inputs: Tensors) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=uuid.uuid4().hex)
    for name, value in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
        raw = serialize_byte_tensor(value).item() if value.dtype == np.object_ else value.tobytes()
        request.raw_input_contents.append(raw)
    return request


def _outputs(response: Any) -> dict[str, Array]:
    outputs = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        flat = (
            deserialize_bytes_tensor(raw)
            if output.datatype == "BYTES"
            else np.frombuffer(raw, triton_to_np_dtype(output.datatype))
        )
        outputs[output.name] = flat.reshape(tuple(output.shape))
    return outputs

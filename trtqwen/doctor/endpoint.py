"""Client of the live checks: tensors over gRPC, a deadline for each request, and gauges."""

from __future__ import annotations

import re
import urllib.request
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trtqwen.diagnostics import ServerError
from trtqwen.triton.client import Array, answer_text, server_error
from trtqwen.triton.messages import ANY_SIZE, infer_request, output_arrays
from trtqwen.triton.streams import read_rest

_DTYPES: dict[str, type[np.generic]] = {"seed": np.uint64, "temperature": np.float32, "top_p": np.float32}


def chat_prompt(question: str) -> str:
    """Return a user's message in Qwen's ChatML."""
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
        self._channel = grpc.insecure_channel(url, options=[ANY_SIZE])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def alive(self) -> bool:
        """Return whether a Triton server answers."""
        try:
            return bool(self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=5).live)
        except grpc.RpcError:
            return False

    def instances(self, model: str) -> int:
        """Return the number of instances of a model; 1 if the server does not report it."""
        try:
            reply = self._stub.ModelConfig(service_pb2.ModelConfigRequest(name=model), timeout=5)
        except grpc.RpcError:
            return 1
        return sum(max(1, group.count) for group in reply.config.instance_group) or 1

    def text(self, prompt: str, max_tokens: int, **options: float) -> Iterator[str]:
        """Yield the pieces of an answer from `ensemble`. Closing the iterator cancels the request.

        Raises:
            ServerError: if the server refuses, or does not answer in time.
        """
        for response in self._stream([_text_request(prompt, max_tokens, options)]):
            yield answer_text(output_arrays(response))

    def order_of_pieces(self, prompt: str, max_tokens: int, seeds: Iterable[int], **options: float) -> list[str]:
        """Ask `ensemble` once for each seed, all at once, and return the request id of every piece that comes.

        All requests share a stream, which keeps the order in which the server answers, however late the client reads.

        Raises:
            ServerError: if the server refuses one, or does not answer in time.
        """
        requests = [_text_request(prompt, max_tokens, {**options, "seed": seed}) for seed in seeds]
        return [response.id for response in self._stream(requests) if answer_text(output_arrays(response))]

    def encode(self, prompt: str) -> tuple[list[int], int]:
        """The prompt's token ids, and the id that ends its answer, from `preprocessing`.

        Raises:
            ServerError: if the server refuses, does not answer in time, or has another kind of `preprocessing`.
        """
        inputs = {"QUERY": np.array([[prompt.encode()]], np.object_), "REQUEST_OUTPUT_LEN": np.array([[1]], np.int32)}
        request = infer_request("preprocessing", uuid.uuid4().hex, inputs)
        try:
            outputs = output_arrays(self._stub.ModelInfer(request, timeout=self._deadline))
        except grpc.RpcError as problem:
            raise server_error(self._url, problem) from None
        missing = [name for name in ("INPUT_ID", "OUT_END_ID") if not outputs.get(name, np.empty(0)).size]
        if missing:
            raise ServerError(
                f"{self._url}: preprocessing gives no {missing[0]}", "serve one of TensorRT-LLM's repositories"
            )
        return outputs["INPUT_ID"].reshape(-1).tolist(), int(outputs["OUT_END_ID"].reshape(-1)[0])

    def tokens(self, ids: list[int], max_tokens: int, **options: int) -> Generator[list[int]]:
        """Yield the token ids of a greedy answer from `tensorrt_llm`. Closing the iterator cancels the request."""
        inputs: dict[str, Array] = {
            "input_ids": np.array([ids], np.int32),
            "input_lengths": np.array([[len(ids)]], np.int32),
            "request_output_len": np.array([[max_tokens]], np.int32),
            "streaming": np.array([[True]]),
            **{name: np.array([[value]], np.int32) for name, value in options.items()},
        }
        for response in self._stream([infer_request("tensorrt_llm", uuid.uuid4().hex, inputs)]):
            outputs = output_arrays(response)
            if "output_ids" in outputs:
                yield outputs["output_ids"].reshape(-1).tolist()

    def gauges(self) -> dict[str, float]:
        """The engine's gauges by `family/value of the label that is neither model nor version`.

        Raises:
            ServerError: if the gauges cannot be read.
        """
        try:
            with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=5) as response:
                text = response.read().decode()
        except (OSError, ValueError):
            raise ServerError(f"{self._metrics}: shows no metrics", "name Triton's metrics address") from None
        gauges = {}
        for family, labels, value in re.findall(r"^nv_trt_llm_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            label = next((v for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k not in ("model", "version")), "")
            gauges[f"{family}/{label}"] = float(value)
        return gauges

    def _stream(self, requests: Sequence[Any]) -> Iterator[Any]:
        """Yield the responses to requests that share a stream."""
        call = self._stub.ModelStreamInfer(iter(requests), timeout=self._deadline)
        try:
            for reply in call:
                if reply.error_message:
                    read_rest(call)
                    model = requests[0].model_name
                    raise ServerError(f"{self._url}: {model} refused the request: {reply.error_message}")
                yield reply.infer_response
        except grpc.RpcError as problem:
            raise server_error(self._url, problem) from None
        finally:
            call.cancel()


def _text_request(prompt: str, max_tokens: int, options: Mapping[str, float]) -> Any:
    inputs: dict[str, Array] = {
        "text_input": np.array([[prompt.encode()]], np.object_),
        "max_tokens": np.array([[max_tokens]], np.int32),
        "stream": np.array([[True]]),
        **{name: np.array([[value]], _DTYPES.get(name, np.int32)) for name, value in options.items()},
    }
    return infer_request("ensemble", uuid.uuid4().hex, inputs)

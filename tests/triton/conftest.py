"""The session's live server on the bundled model, and the ways tests talk to it."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import (
    deserialize_bytes_tensor,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

from tests.waiting import wait_for
from trtqwen.triton.server import TritonServer


@pytest.fixture(scope="session")
def repository(served_repository: Path) -> Path:
    """A repository of the bundled model: 16 requests in the batch, 512 tokens each, blocks of 16 tokens."""
    return served_repository


@pytest.fixture(scope="session")
def server(served: TritonServer) -> TritonServer:
    return served


@contextmanager
def played_triton(servicer: Any, threads: int = 4) -> Iterator[str]:
    """The address of a gRPC server that answers as the servicer does."""
    server = grpc.server(ThreadPoolExecutor(threads))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


class Reply:
    """One response of a stream: output tensors by name, or an error; and whether it is the last."""

    def __init__(self, message: Any) -> None:
        self.error: str = message.error_message
        response = message.infer_response
        self.final: bool = response.parameters["triton_final_response"].bool_param
        self.outputs: dict[str, npt.NDArray[Any]] = {}
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            flat = (
                deserialize_bytes_tensor(raw)
                if output.datatype == "BYTES"
                else np.frombuffer(raw, triton_to_np_dtype(output.datatype))
            )
            self.outputs[output.name] = flat.reshape(tuple(output.shape))

    @property
    def text(self) -> str:
        return "".join(piece.decode() for piece in self.outputs["text_output"].reshape(-1))

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.outputs["output_ids"].reshape(-1).tolist()
        return ids


class Call:
    """A running stream of replies; iterate it, or cancel it as a client that goes away does."""

    def __init__(
        self, server: TritonServer, model: str, inputs: dict[str, npt.NDArray[Any]], request_id: str = ""
    ) -> None:
        self._channel = grpc.insecure_channel(server.grpc_url)
        request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
        for name, value in inputs.items():
            request.inputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
            request.raw_input_contents.append(
                serialize_byte_tensor(value).item() if value.dtype == np.object_ else value.tobytes()
            )
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stream = stub.ModelStreamInfer(iter([request]), timeout=60)

    def __iter__(self) -> Iterator[Reply]:
        with self._channel:
            for message in self._stream:
                yield Reply(message)

    def cancel(self) -> None:
        self._stream.cancel()
        self._channel.close()


def text_request(*prompts: str | bytes, max_tokens: int = 16, **inputs: Any) -> dict[str, npt.NDArray[Any]]:
    """Input tensors of `ensemble`, one row a prompt; further scalars go to every row."""
    rows = len(prompts)
    texts = [[prompt if isinstance(prompt, bytes) else prompt.encode()] for prompt in prompts]
    request = {"text_input": np.array(texts, np.object_), "max_tokens": np.full((rows, 1), max_tokens, np.int32)}
    return request | {name: np.repeat(np.array([[value]]), rows, axis=0) for name, value in inputs.items()}


def id_request(ids: list[int], max_tokens: int, **inputs: Any) -> dict[str, npt.NDArray[Any]]:
    """Input tensors of `tensorrt_llm` for one prompt."""
    request = {
        "input_ids": np.array([ids], np.int32),
        "input_lengths": np.array([[len(ids)]], np.int32),
        "request_output_len": np.array([[max_tokens]], np.int32),
    }
    return request | {name: np.array([[value]]) for name, value in inputs.items()}


def metrics(server: TritonServer) -> dict[str, float]:
    """The engine's gauges, by `family/label value`; they come a second after the engine has loaded."""

    def text() -> str:
        with urllib.request.urlopen(f"http://{server.metrics_url}/metrics") as response:
            return str(response.read().decode())

    assert wait_for(lambda: "nv_trt_llm_general_metrics" in text())
    lines = text().splitlines()
    gauges = {}
    for line in lines:
        if line.startswith("nv_trt_llm_"):
            name, value = line.rsplit(" ", 1)
            family, labels = name.rstrip("}").split("{")
            [label] = [
                part.split("=")[1].strip('"')
                for part in labels.split(",")
                if part.split("=")[0] not in ("model", "version")
            ]
            gauges[f"{family}/{label}"] = float(value)
    return gauges


def in_threads(actions: list[Callable[[], Any]]) -> list[Any]:
    """Run actions at the same time; their results in order, exceptions among them."""
    results: list[Any] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            results[index] = actions[index]()
        except Exception as problem:
            results[index] = problem

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

"""No client of ours cancels a stream whose answer is over: Triton would keep its request."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.triton.conftest import id_request, played_triton
from tests.waiting import GENEROUS
from trtqwen.bench.endpoint import Target, connect
from trtqwen.bench.workload import Ask
from trtqwen.diagnostics import ServerError
from trtqwen.doctor.endpoint import Endpoint
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.triton import streams
from trtqwen.triton.client import stream
from trtqwen.triton.streams import read_rest, read_rest_async

_LINGER = 0.2  # seconds between the last response and the stream's end; a client that cancels does it at once


class Slow(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Sends an error or the final token, and ends the stream a little later.

    Attributes:
        refuses: whether it sends an error.
        ends: whether it ends a stream by itself.
        cancelled: of each stream, whether its client cancelled it.
    """

    def __init__(self) -> None:
        self.refuses, self.ends = True, True
        self.cancelled: queue.Queue[bool] = queue.Queue()

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelMetadataResponse()

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        left = threading.Event()
        context.add_callback(left.set)
        message = service_pb2.ModelStreamInferResponse()
        if self.refuses:
            message.error_message = "the prompt is too long"
        else:
            message.infer_response.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1, 1])
            message.infer_response.raw_output_contents.append(np.int32(7).tobytes())
            message.infer_response.parameters["triton_final_response"].bool_param = True
        yield message
        self.cancelled.put(left.wait(_LINGER if self.ends else GENEROUS))


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[str, Slow]]:
    servicer = Slow()
    with played_triton(servicer) as url:
        yield url, servicer


def doctor(url: str) -> None:
    with Endpoint(url, url) as endpoint, pytest.raises(ServerError, match="too long"):
        list(endpoint.tokens([5], 8))


def infer(url: str) -> None:
    with pytest.raises(ServerError, match="too long"):
        list(stream(url, "hi", 8, chat=False))


def bench(url: str) -> None:
    async def ask() -> None:
        endpoint = await connect(Target(url, "grpc", "tensorrt_llm"))
        with pytest.raises(ServerError, match="too long"):
            await endpoint.generate(Ask((5,), 8), lambda count: None)
        await endpoint.close()

    asyncio.run(ask())


def gateway(url: str) -> None:
    """Its answers end with a stop token: it leaves with the last message."""

    async def ask() -> None:
        replica = Replica(url)
        with suppress(ApiError):
            async with aclosing(replica.generate("1", id_request([5], 8), 60)) as replies:
                async for _ in replies:
                    break
        await replica.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("client", "refuses"), [(doctor, True), (infer, True), (bench, True), (gateway, True), (gateway, False)]
)
def test_a_stream_is_read_to_its_end_when_the_answer_is_over(
    slow: tuple[str, Slow], client: Callable[[str], None], refuses: bool
) -> None:
    url, servicer = slow
    servicer.refuses, servicer.ends = refuses, True
    client(url)
    assert servicer.cancelled.get(timeout=GENEROUS) is False


def test_a_stream_without_an_end_is_left_in_time(slow: tuple[str, Slow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_PATIENCE", 0.1)
    url, servicer = slow
    servicer.ends = False
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        read_rest(stub.ModelStreamInfer(iter([service_pb2.ModelInferRequest()])))
    assert servicer.cancelled.get(timeout=GENEROUS) is True

    async def read() -> None:
        async with grpc.aio.insecure_channel(url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            await read_rest_async(stub.ModelStreamInfer([service_pb2.ModelInferRequest()]))

    asyncio.run(read())
    assert servicer.cancelled.get(timeout=GENEROUS) is True

"""The client against a gRPC server that hangs or answers oddly."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from tests.triton.conftest import played_triton
from trtqwen.diagnostics import InputError, ServerError
from trtqwen.triton.client import stream


class Stuck(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers `cut` with broken UTF-8, `long` until a stop, and anything else never.

    Notes what was asked of which model.

    Attributes:
        cancelled: whether the client cancelled the stream of `long`; empty while it runs.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.cancelled: queue.Queue[bool] = queue.Queue()
        self._stopped = threading.Event()

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse()

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelMetadataResponse()

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        request = next(requests)
        self.asked.append((request.model_name, request.id))
        response = service_pb2.ModelInferResponse(model_name="ensemble")
        response.outputs.add(name="text_output", datatype="BYTES", shape=[1, 1])
        response.raw_output_contents.append(serialize_byte_tensor(np.array([b"ab\xe8"], np.object_)).item())
        if request.model_name == "tensorrt_llm":
            self._stopped.set()
        elif request.id == "cut":
            yield service_pb2.ModelStreamInferResponse(infer_response=response)
        elif request.id == "long":
            yield service_pb2.ModelStreamInferResponse(infer_response=response)
            self._stopped.wait(60)
            time.sleep(0.1)  # a client that cancels does it now
            yield service_pb2.ModelStreamInferResponse(infer_response=response)
            self.cancelled.put(not context.is_active())
        else:
            while context.is_active():
                time.sleep(0.01)


@pytest.fixture
def stuck() -> Iterator[tuple[str, Stuck]]:
    servicer = Stuck()
    with played_triton(servicer) as url:
        yield url, servicer


def test_a_stuck_server_is_left_in_time_and_told_to_stop(stuck: tuple[str, Stuck]) -> None:
    url, servicer = stuck
    start = time.monotonic()
    with pytest.raises(ServerError, match=f"{url}: the server did not answer in time; "):
        list(stream(url, "hi", 8, request_id="mine", timeout=0.3, chat=False))
    assert time.monotonic() - start < 30
    assert servicer.asked == [("ensemble", "mine"), ("tensorrt_llm", "mine")]


def test_an_answer_that_is_left_is_stopped_and_its_stream_not_cancelled(stuck: tuple[str, Stuck]) -> None:
    url, servicer = stuck
    pieces = stream(url, "hi", 8, request_id="long", chat=False)
    assert next(pieces).text == "ab\ufffd"
    assert isinstance(pieces, Generator)
    pieces.close()
    assert servicer.asked == [("ensemble", "long"), ("tensorrt_llm", "long")]
    assert servicer.cancelled.get(timeout=60) is False


def test_broken_characters_of_a_foreign_server_are_marked(stuck: tuple[str, Stuck]) -> None:
    [piece] = stream(stuck[0], "hi", 8, request_id="cut", chat=False)
    assert (piece.text, piece.num_tokens) == ("ab\ufffd", 0)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="not Unicode text"):
        list(stream("127.0.0.1:1", "\udcff", 8, chat=False))

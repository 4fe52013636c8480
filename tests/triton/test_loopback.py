"""A model's connection to its own server, which the test plays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.triton.conftest import played_triton
from trtqwen.diagnostics import RequestError
from trtqwen.triton.loopback import Loopback
from trtqwen.triton.messages import infer_response, input_arrays

LARGE = 5 << 20  # bytes, more than gRPC takes by default


class Played(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Sends back what it is asked, the ids many times; the model `refuses` sends an error and ends a little later.

    Attributes:
        requests: those that came.
        cancelled: of each stream that has ended, whether its client cancelled it.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.cancelled: list[bool] = []

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        left = threading.Event()
        context.add_callback(left.set)
        [request] = requests
        self.requests.append(request)
        inputs = input_arrays(request)
        outputs = inputs | {"ids": np.repeat(inputs["ids"], LARGE // 4)}
        for _ in range(3):
            yield service_pb2.ModelStreamInferResponse(infer_response=infer_response(outputs))
        if request.model_name == "refuses":
            yield service_pb2.ModelStreamInferResponse(error_message="no token is left")
            left.wait(0.2)
        self.cancelled.append(left.is_set())


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.fixture
def loopback(played: Played) -> Iterator[Loopback]:
    with played_triton(played) as address, closing(Loopback(address)) as connection:
        yield connection


def test_responses_come_as_arrays_and_the_request_says_all(loopback: Loopback, played: Played) -> None:
    inputs = {"ids": np.array([7], np.int32), "text": np.array([[b"\xff"]], np.object_)}
    responses = list(loopback.stream("echo", "me", inputs, ["ids", "text"], {"from": "you"}))
    assert len(responses) == 3
    for response in responses:
        assert response["ids"].tolist() == [7] * (LARGE // 4)
        assert response["text"].tolist() == [[b"\xff"]]
    [request] = played.requests
    assert (request.model_name, request.id) == ("echo", "me")
    assert [output.name for output in request.outputs] == ["ids", "text"]
    assert request.parameters["from"].string_param == "you"


def test_an_error_is_raised_and_its_stream_read_to_the_end(loopback: Loopback, played: Played) -> None:
    responses = loopback.stream("refuses", "me", {"ids": np.zeros(1, np.int32)}, ["ids"], {})
    with pytest.raises(RequestError, match="no token is left"):
        list(responses)
    assert played.cancelled == [False]


def test_who_stops_early_leaves_no_stream_open(loopback: Loopback, played: Played) -> None:
    responses = loopback.stream("echo", "me", {"ids": np.zeros(1, np.int32)}, ["ids"], {})
    next(responses)
    responses.close()  # type: ignore[attr-defined]
    assert played.cancelled == [False]


def test_a_server_that_does_not_answer_is_an_error_of_the_request() -> None:
    with (
        closing(Loopback("127.0.0.1:1")) as connection,
        pytest.raises(RequestError, match=r"engine: the server's own gRPC endpoint fails"),
    ):
        list(connection.stream("engine", "me", {"ids": np.zeros(1, np.int32)}, ["ids"], {}))

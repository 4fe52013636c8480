"""The gateway's carrier at one Triton server: one stream for the tokens of all its answers; see `triton.carrier`."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import numpy as np

from trtqwen.gateway.errors import ApiError, from_engine, from_rpc
from trtqwen.triton.contract import EXTENSIONS
from trtqwen.triton.messages import infer_request

MODEL = "tensorrt_llm"
_CLOSE_SECONDS = 5.0
_COLUMNS = 2  # of a row: number and token
_INPUTS = {  # those that every request has
    "input_ids": np.zeros((1, 1), np.int32),
    "input_lengths": np.ones((1, 1), np.int32),
    "request_output_len": np.ones((1, 1), np.int32),
    "streaming": np.array([[True]]),
}
_STOP = {**_INPUTS, "stop": np.array([[True]])}


class Carried(Protocol):
    """An answer whose tokens a carrier may bring."""

    def bring(self, token_id: int) -> None:
        """Take its next token."""

    def abort(self, failure: ApiError) -> None:
        """End it with an error."""


class Carrier:
    """Brings tokens to answers. It opens with the first answer, and the engine ends it after the last one.

    Args:
        stub: gRPC stub of the server.
        address: of the server, for errors.

    Attributes:
        works: whether the engine may have carriers; it shows with the first one.
    """

    def __init__(self, stub: Any, address: str) -> None:
        self.works = True
        self._stub = stub
        self._address = address
        self._name = ""
        self._answers: dict[int, Carried] = {}
        self._next = 0
        self._task: asyncio.Task[None] | None = None

    def join(self, answer: Carried) -> tuple[str, int]:
        """Return the carrier's name and the answer's number there, for its request.

        An engine that has no carrier of that name sends the tokens on the answer's own stream.
        """
        if self._task is None:
            self._name = uuid.uuid4().hex
            self._task = asyncio.create_task(self._run(self._open()))
        self._next += 1
        self._answers[self._next] = answer
        return self._name, self._next

    def leave(self, number: int) -> None:
        """Bring nothing more to an answer."""
        self._answers.pop(number, None)

    async def close(self) -> None:
        """Wait until the engine has ended it, because no answer uses it."""
        if (task := self._task) is not None:
            await asyncio.wait((task,), timeout=_CLOSE_SECONDS)
            task.cancel()  # nothing, if it has ended

    def _open(self) -> Any:
        parameters = {EXTENSIONS: json.dumps({"carry": self._name})}
        request = infer_request(MODEL, f"carrier-{self._name}", _INPUTS, ["output_ids"], parameters)
        return self._stub.ModelStreamInfer(once(request), timeout=None, metadata=())

    async def _run(self, stream: Any) -> None:
        try:
            while (message := await stream.read()) is not grpc.aio.EOF:
                if message.error_message:
                    raise from_engine(message.error_message)
                self._dispatch(message.infer_response)
        except grpc.RpcError as problem:
            self._fail(from_rpc(self._address, problem))
        except ApiError as problem:
            self._fail(problem)
        finally:
            stream.cancel()  # nothing, if it has ended
            self._task = None

    def _dispatch(self, response: Any) -> None:
        answers = self._answers
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            if output.shape[-1] != _COLUMNS:  # the tokens of an engine without carriers
                self.works = False
                return
            values = iter(memoryview(raw).cast("i"))
            for number, token_id in zip(values, values, strict=True):
                if (answer := answers.get(number)) is not None:
                    answer.bring(token_id)

    def _fail(self, failure: ApiError) -> None:
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer.abort(failure)


def stop_request(place: tuple[str, int]) -> Any:
    """A request that stops the answer at a place on a carrier."""
    return infer_request(MODEL, "", _STOP, ["output_ids"], {EXTENSIONS: json.dumps({"carrier": place})})


async def once(request: Any) -> AsyncIterator[Any]:
    """The requests of a stream that has one."""
    yield request

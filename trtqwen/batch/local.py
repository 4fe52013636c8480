"""An engine in this process with the gRPC interface that the gateway uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from trtqwen.gateway.generation.upstream import Replica
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.engines import Engine, open_engine
from trtqwen.triton.messages import infer_response, input_arrays
from trtqwen.triton.parameters import repository_parameters
from trtqwen.triton.service import EngineService
from trtqwen.triton.tensors import Limits

Array = npt.NDArray[Any]


class LocalTriton:
    """Answers `ModelStreamInfer` of the model `tensorrt_llm` from an engine in this process.

    Attributes:
        addresses: one name for the gateway; no port is open.
    """

    addresses = ("127.0.0.1:1",)

    def __init__(self, service: EngineService) -> None:
        self._service = service

    def connect(self, address: str) -> Replica:
        """The gateway's connection to it."""
        return Replica(address, self, carries=False)  # a response costs little here

    def ModelStreamInfer(self, requests: AsyncIterator[Any], timeout: float, metadata: object = ()) -> _Call:
        """Start a call, with the interface of grpc's stub."""
        return _Call(self._service, requests)

    def check(self) -> None:
        """Raise an EngineError if the engine has stopped."""
        self._service.gauges()


class _Call:
    """A stream of responses; `carrier.Sender` of its request."""

    def __init__(self, service: EngineService, requests: AsyncIterator[Any]) -> None:
        self._service = service
        self._requests = requests
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._begun = self._ended = self._cancelled = False

    async def read(self) -> Any:
        if not self._begun:
            self._begun = True
            async for request in self._requests:
                self._service.handle(request.id, input_arrays(request), self)
        if self._ended and self._messages.empty():
            return grpc.aio.EOF
        message = await self._messages.get()
        return grpc.aio.EOF if message is None else message

    def cancel(self) -> None:
        if not self._ended and not self._cancelled:
            self._cancelled = True
            self._service.cancel_abandoned()

    def send(self, tensors: Mapping[str, Array], *, final: bool) -> None:
        message = service_pb2.ModelStreamInferResponse(infer_response=infer_response(tensors))
        self._put(message)
        if final:
            self._put(None)

    def fail(self, error: str) -> None:
        self._put(service_pb2.ModelStreamInferResponse(error_message=error))
        self._put(None)

    def abandoned(self) -> bool:
        return self._cancelled

    def _put(self, message: Any) -> None:
        def put() -> None:
            self._ended = self._ended or message is None
            self._messages.put_nowait(message)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)


@contextmanager
def local_triton(repository: Path) -> Iterator[LocalTriton]:
    """Start the engine of a model repository in this process.

    Raises:
        InputError: if the repository or its engine cannot be used.
        EngineError: if the engine does not start.
    """
    parameters = repository_parameters(repository)
    engine: Engine = open_engine(parameters.engine, parameters.executor)
    try:
        sizes = engine.engine_config
        limits = Limits(sizes.pretrained_config.vocab_size, sizes.build_config.max_batch_size)
        token_bytes = Tokenizer(parameters.tokenizer).token_bytes
        yield LocalTriton(EngineService(engine, limits, token_bytes, exclude_input=True))
    finally:
        engine.shutdown()

"""How a model asks another model of its own server: over the server's gRPC endpoint.

Triton's own call for that, `InferenceRequest.exec`, is not safe where several threads use it. In the python backend,
from 24.10 to 26.09:

- Both sides of a call wait for a condition without looking whether it is true (`InferRequest::Exec`,
  `ExecuteBLSRequest`). One that wakes too early reads handles that are not set yet, and corrupts the shared memory.
  Servers under concurrent calls crash (triton-inference-server/server 8882).
- `exec(decoupled=True)` deadlocks. The thread that reads a response takes Python's lock while it holds the lock of
  its stream (`ResponseIterator::Next`), the thread that brings responses takes that while it holds the lock of all
  streams (`ProcessBLSResponseDecoupled`), and the thread that begins a stream takes that while it holds Python's
  lock (`GetResponseIterator`). The model then answers no request.
- Before 24.12, `exec(decoupled=True)` frees NumPy arrays without Python's lock when a stream ends (`SendCleanupId`).
  That corrupts the heap of the model's process, which aborts, and Triton aborts after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy.typing as npt
from tritonclient.grpc import service_pb2_grpc

from trtqwen.diagnostics import RequestError
from trtqwen.triton.messages import infer_request, output_arrays
from trtqwen.triton.streams import read_rest

Array = npt.NDArray[Any]
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # the server is on this machine
)


class Loopback:
    """A connection from a model to its own server. Thread-safe.

    Args:
        address: host:port of the server's gRPC endpoint.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def stream(
        self,
        model: str,
        request_id: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        parameters: Mapping[str, str],
    ) -> Iterator[dict[str, Array]]:
        """Yield the responses of one request as they come. A caller that stops early waits for the stream's end.

        Raises:
            RequestError: if the model answers with an error, or the server does not answer.
        """
        request = infer_request(model, request_id, inputs, outputs, parameters)
        call = self._stub.ModelStreamInfer(iter([request]))
        over = False
        try:
            for reply in call:
                if reply.error_message:
                    raise RequestError(reply.error_message)
                yield output_arrays(reply.infer_response)
            over = True
        except grpc.RpcError as problem:
            over = True
            raise RequestError(f"{model}: the server's own gRPC endpoint fails ({problem.details()})") from None
        finally:
            if not over:
                read_rest(call)

    def close(self) -> None:
        """End what still runs, and disconnect."""
        self._channel.close()

"""The end of a Triton stream: clients read a finished answer's stream to its end and do not cancel it.

Triton's gRPC server never releases a request whose stream is cancelled between its last response and the stream's
end: `IssueRequestCancellation` in infer_handler.h, the same from 23.10 to 26.07, makes it wait for a response that
has been sent. The request holds its model, so a stopping Triton waits until `--exit-timeout-secs` has passed. Before
25.04, Triton may also crash when an answer ends as its stream is cancelled (triton-inference-server/server 8078).
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

import grpc

_PATIENCE = 5.0  # seconds, until a stream that does not end is cancelled anyway
_FINAL = "triton_final_response"


def is_over(message: Any) -> bool:
    """Whether a `ModelStreamInferResponse` is the last of its answer: an error, or marked as final."""
    if message.error_message:
        return True
    parameters = message.infer_response.parameters
    return _FINAL in parameters and bool(parameters[_FINAL].bool_param)


def read_rest(call: Any) -> None:
    """Read a stream to its end, and cancel it after a timeout."""
    patience = threading.Timer(_PATIENCE, call.cancel)
    patience.start()
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass  # the server has ended, or the answer did not end
    finally:
        patience.cancel()


async def read_rest_async(call: Any, patience: float = _PATIENCE) -> None:
    """`read_rest` of a stream of `grpc.aio`.

    Args:
        patience: seconds until a stream that does not end is cancelled.
    """

    async def read() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    try:
        with suppress(grpc.RpcError, asyncio.TimeoutError):
            await asyncio.wait_for(read(), patience)
    finally:
        call.cancel()  # nothing, if it has ended

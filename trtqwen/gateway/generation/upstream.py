"""The engine behind gRPC: each sequence is one stream to Triton's model `tensorrt_llm` on one of the replicas."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from math import isnan
from types import MappingProxyType
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trtqwen.gateway.errors import ApiError, from_engine, from_rpc
from trtqwen.triton.contract import EXTENSIONS
from trtqwen.triton.messages import ANY_SIZE, infer_request
from trtqwen.triton.streams import is_over, read_rest_async

Array = npt.NDArray[Any]
MODEL = "tensorrt_llm"
# Outputs by the inputs that ask for them. Each tensor of a response costs Triton time, so no others are asked for.
_OUTPUTS = {"return_log_probs": "output_log_probs", "return_perf_metrics": "kv_cache_reused_blocks"}
_CHANNEL_OPTIONS = (
    ANY_SIZE,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a restarted Triton is found within a second, not within two minutes
)


Top = tuple[tuple[int, float], ...]


class Reply(NamedTuple):
    """New tokens of a sequence.

    Attributes:
        log_probs: one for each token; empty unless asked for.
        top: for each token, ids and log probabilities of the most likely at its place; empty unless asked for.
        prompt: for each prompt token its log probability, None for the first, and the most likely at its place; once.
        reused_blocks: KV cache blocks of the prompt that were computed before, with the last tokens.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    prompt: tuple[tuple[float | None, Top], ...] = ()
    reused_blocks: int | None = None


class _Call:
    """A stream that runs; `failure` is why it was ended from outside.

    Attributes:
        unread: prompt tokens, until the first token arrives.
        heard: time of its start or its last token.
    """

    def __init__(self, stream: Any, prompt_tokens: int) -> None:
        self.stream = stream
        self.unread = prompt_tokens
        self.heard = time.monotonic()
        self.failure: ApiError | None = None

    def abort(self, failure: ApiError) -> None:
        self.failure = failure
        self.stream.cancel()


class Replica:
    """One Triton server.

    Args:
        stub: gRPC stub to use instead of the server at the address.

    Attributes:
        heard: when it last sent a token, in seconds of the monotonic clock.
    """

    def __init__(self, address: str, stub: Any = None) -> None:
        self.address = address
        self.heard = float("-inf")
        self._channel = None if stub else grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
        self._stub = stub or service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._calls: set[_Call] = set()
        self._ending: set[asyncio.Task[None]] = set()

    async def generate(
        self,
        request_id: str,
        inputs: Mapping[str, Array],
        timeout: float,
        extensions: Mapping[str, Any] = MappingProxyType({}),
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> AsyncGenerator[Reply, None]:
        """Yield a sequence's tokens as they come. Leaving the iterator early cancels the sequence in the engine.

        Args:
            inputs: tensors of `tensorrt_llm`.
            timeout: seconds for the whole answer.
            extensions: what is asked for beyond them.
            headers: metadata of the call.

        Raises:
            ApiError: if the engine refuses, fails, or does not answer in time.
        """
        outputs = ["output_ids", *(output for name, output in _OUTPUTS.items() if name in inputs)]
        if "return_prompt_log_probs" in extensions:
            outputs.append("context_logits")
        parameters = {EXTENSIONS: json.dumps(extensions)} if extensions else {}
        request = infer_request(MODEL, request_id, inputs, outputs, parameters)
        stream = self._stub.ModelStreamInfer(_once(request), timeout=timeout, metadata=tuple(headers.items()))
        call = _Call(stream, inputs["input_ids"].size)
        self._calls.add(call)
        received = 0
        message: Any = None
        try:
            while (message := await call.stream.read()) is not grpc.aio.EOF:
                if message.error_message:
                    raise from_engine(message.error_message)
                call.heard = self.heard = time.monotonic()
                call.unread = 0
                reply = _reply(message.infer_response, received)
                received += len(reply.token_ids)
                yield reply
        except grpc.RpcError as problem:
            raise from_rpc(self.address, problem) from None
        except asyncio.CancelledError:
            if call.failure is not None:
                raise call.failure from None
            raise
        finally:
            self._calls.discard(call)
            if isinstance(message, service_pb2.ModelStreamInferResponse) and is_over(message):
                self._finish(call)
            else:
                call.stream.cancel()

    def _finish(self, call: _Call) -> None:
        """Read the stream of a finished answer to its end, without its client."""
        ending = asyncio.create_task(read_rest_async(call.stream))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def abort_all(self, failure: ApiError) -> None:
        """End every running sequence with an error."""
        for call in tuple(self._calls):
            call.abort(failure)

    @property
    def unread_tokens(self) -> int:
        """Return the prompt tokens of sequences without a token: the engine reads them, or they wait in it."""
        return sum(call.unread for call in self._calls)

    def abort_stalled(self, silence: float, reading: float) -> None:
        """End stalled sequences.

        Args:
            silence: seconds without one after which a sequence that has begun counts as stalled; one that has not
                waits inside the engine, and counts when no other request has had a token for this time either.
            reading: further seconds that the engine may take to read prompts.
        """
        now = time.monotonic()
        for call in tuple(self._calls):
            heard = max(call.heard, self.heard) if call.unread else call.heard
            if now - heard > silence + reading:
                call.abort(ApiError(504, f"the engine sent no token for {silence:g} s", "stalled"))

    async def close(self) -> None:
        if self._ending:
            await asyncio.wait(self._ending)
        if self._channel is not None:
            await self._channel.close()


async def _once(request: Any) -> AsyncIterator[Any]:
    yield request


def _reply(response: Any, received: int) -> Reply:
    outputs, raws = response.outputs, response.raw_output_contents
    if len(raws) == 1 and outputs[0].name == "output_ids":  # as nearly all are
        return Reply(tuple(memoryview(raws[0]).cast("i")))
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    prompt: tuple[tuple[float | None, Top], ...] = ()
    reused: int | None = None
    for output, raw in zip(outputs, raws, strict=True):
        if output.name == "output_ids":
            ids = tuple(memoryview(raw).cast("i"))
        elif output.name == "output_log_probs":
            if len(output.shape) == 3 and output.shape[1] > 1:
                table = _table(raw, output.shape[1:]).T
                log_probs, top = tuple(table[:, 0].tolist()), _likeliest(table)
            else:
                log_probs = tuple(memoryview(raw).cast("f"))
        elif output.name == "context_logits":  # asked for as log probabilities
            table = _table(raw, output.shape[1:])
            own = (None if isnan(value) else value for value in table[:, 0].tolist())
            prompt = tuple(zip(own, _likeliest(table), strict=True))
        elif output.name == "kv_cache_reused_blocks":
            reused = int(memoryview(raw).cast("i")[0])
    if len(log_probs) > len(ids):  # an engine may repeat those of the tokens before
        log_probs = log_probs[received : received + len(ids)]
    return Reply(ids, log_probs, top, prompt, reused)


def _table(raw: bytes, shape: Any) -> Array:
    return np.frombuffer(raw, np.float32).reshape(tuple(shape))


def _likeliest(table: Array) -> tuple[Top, ...]:
    """Of rows with a log probability, ids, and as many log probabilities: the ids with theirs."""
    count = (table.shape[1] - 1) // 2
    ids, values = table[:, 1 : 1 + count].astype(np.int64).tolist(), table[:, 1 + count :].tolist()
    return tuple(
        tuple((token_id, value) for token_id, value in zip(*row, strict=True) if token_id >= 0)
        for row in zip(ids, values, strict=True)
    )

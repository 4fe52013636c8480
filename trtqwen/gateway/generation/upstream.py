"""The engine behind gRPC: each sequence is one stream to Triton's model `tensorrt_llm` on one of the replicas."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from math import isnan
from types import MappingProxyType
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trtqwen.gateway.errors import ApiError, from_engine, from_rpc
from trtqwen.gateway.generation.carrier import MODEL, Carrier, once, stop_request
from trtqwen.triton.contract import EXTENSIONS
from trtqwen.triton.messages import ANY_SIZE, infer_request
from trtqwen.triton.streams import is_over, read_rest_async

Array = npt.NDArray[Any]
# Outputs by the inputs that ask for them. Each tensor of a response costs Triton time, so no others are asked for.
_OUTPUTS = {"return_log_probs": "output_log_probs", "return_perf_metrics": "kv_cache_reused_blocks"}
_LEAVING_SECONDS = 1.0  # until an answer that another engine instance has, or a long step holds, is cancelled
_MORE_THAN_TOKENS = frozenset({"output_log_probs", "context_logits"})
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
        num_tokens: of the answer so far, if it may have a carrier; those before these tokens come through it.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    prompt: tuple[tuple[float | None, Top], ...] = ()
    reused_blocks: int | None = None
    num_tokens: int = 0


class _Call:
    """A stream that runs; `failure` is why it was ended from outside.

    Attributes:
        unread: prompt tokens, until the first token arrives.
        heard: time of its start or its last token.
    """

    stream: Any

    def __init__(self, prompt_tokens: int) -> None:
        self.unread = prompt_tokens
        self.heard = time.monotonic()
        self.failure: ApiError | None = None
        self._brought: list[int] = []  # tokens from a carrier that wait
        self._news = asyncio.Event()
        self._reading: asyncio.Task[Any] | None = None

    def bring(self, token_id: int) -> None:
        self._brought.append(token_id)
        self._news.set()

    def abort(self, failure: ApiError) -> None:
        self.failure = failure
        self._news.set()
        self.cancel()

    def cancel(self) -> None:
        self.stream.cancel()

    async def read(self) -> Any:
        """Return the stream's next message, or tokens that a carrier has brought before it."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self.stream.read())
            self._reading.add_done_callback(self._end_reading)
        while not (self._brought or self._reading.done()):
            await self._wait()
        if self._brought:
            return self._take()
        reading, self._reading = self._reading, None
        return reading.result()

    async def tokens(self) -> tuple[int, ...]:
        """Return the next tokens from the carrier."""
        while not self._brought:
            await self._wait()
        return self._take()

    def last(self, message: Any) -> Any:
        """Return the message that arrived last, given the one that was returned last."""
        reading = self._reading
        if reading is None or not reading.done() or reading.cancelled() or reading.exception() is not None:
            return message
        return reading.result()

    async def _wait(self) -> None:
        if self.failure is None:
            self._news.clear()
            await self._news.wait()
        if self.failure is not None:
            raise self.failure

    def _take(self) -> tuple[int, ...]:
        brought, self._brought = self._brought, []
        return tuple(brought)

    def _end_reading(self, reading: asyncio.Future[Any]) -> None:
        self._news.set()
        if not reading.cancelled():
            reading.exception()  # a client that has left does not ask for it


class Replica:
    """One Triton server.

    Args:
        stub: gRPC stub to use instead of the server at the address.
        carries: whether answers may share a carrier.

    Attributes:
        heard: when it last sent a token, in seconds of the monotonic clock.
    """

    def __init__(self, address: str, stub: Any = None, *, carries: bool = True) -> None:
        self.address = address
        self.heard = float("-inf")
        self._channel = None if stub else grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
        self._stub = stub or service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._carrier = Carrier(self._stub, address) if carries else None
        self._calls: set[_Call] = set()
        self._ending: set[asyncio.Task[None]] = set()

    async def generate(
        self,
        request_id: str,
        inputs: Mapping[str, Array],
        timeout: float,
        extensions: Mapping[str, Any] = MappingProxyType({}),
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        carried: bool = False,
    ) -> AsyncGenerator[Reply, None]:
        """Yield a sequence's tokens as they come. Leaving the iterator early cancels the sequence in the engine.

        Args:
            inputs: tensors of `tensorrt_llm`.
            timeout: seconds for the whole answer.
            extensions: what is asked for beyond them.
            headers: metadata of the call.
            carried: a carrier may bring the tokens, if only tokens are asked for.

        Raises:
            ApiError: if the engine refuses, fails, or does not answer in time.
        """
        outputs = ["output_ids", *(output for name, output in _OUTPUTS.items() if name in inputs)]
        if "return_prompt_log_probs" in extensions:
            outputs.append("context_logits")
        call, place = _Call(inputs["input_ids"].size), None
        carrier = self._carrier if carried and not _MORE_THAN_TOKENS.intersection(outputs) else None
        if carrier is not None and carrier.works:
            place = carrier.join(call)
            extensions = {**extensions, "carrier": place}
            outputs.append("sequence_length")
        parameters = {EXTENSIONS: json.dumps(extensions)} if extensions else {}
        request = infer_request(MODEL, request_id, inputs, outputs, parameters)
        call.stream = self._stub.ModelStreamInfer(once(request), timeout=timeout, metadata=tuple(headers.items()))
        self._calls.add(call)
        received = 0
        message: Any = None
        ended = False
        try:
            read = call.stream.read if place is None else call.read
            while (message := await read()) is not grpc.aio.EOF:
                call.heard = self.heard = time.monotonic()
                call.unread = 0
                if isinstance(message, tuple):
                    received += len(message)
                    yield Reply(message)
                    continue
                if message.error_message:
                    raise from_engine(message.error_message)
                reply = _reply(message.infer_response, received)
                while received < reply.num_tokens - len(reply.token_ids):
                    tokens = await call.tokens()
                    received += len(tokens)
                    yield Reply(tokens)
                received += len(reply.token_ids)
                yield reply
            ended = True
        except grpc.RpcError as problem:
            ended = True
            raise from_rpc(self.address, problem) from None
        except asyncio.CancelledError:
            if call.failure is not None:
                raise call.failure from None
            raise
        finally:
            self._calls.discard(call)
            if carrier is not None and place is not None:
                carrier.leave(place[1])
            message = call.last(message)
            if isinstance(message, service_pb2.ModelStreamInferResponse) and is_over(message):
                self._finish(read_rest_async(call.stream))
            elif place is None or ended or call.failure is not None:
                call.stream.cancel()
            else:
                self._finish(self._leave(place, call))

    async def _leave(self, place: tuple[str, int], call: _Call) -> None:
        """Stop an answer whose client has left. Triton may crash where a stream is cancelled (docs/status.md)."""
        await read_rest_async(self._stub.ModelStreamInfer(once(stop_request(place)), timeout=None, metadata=()))
        await read_rest_async(call, _LEAVING_SECONDS)  # goes on with the read that runs

    def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """End an answer without its client."""
        ending = asyncio.create_task(work)
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
        if self._carrier is not None:
            await self._carrier.close()
        if self._channel is not None:
            await self._channel.close()


def _reply(response: Any, received: int) -> Reply:
    outputs, raws = response.outputs, response.raw_output_contents
    if len(raws) == 1 and outputs[0].name == "output_ids":  # as nearly all are
        return Reply(tuple(memoryview(raws[0]).cast("i")))
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    prompt: tuple[tuple[float | None, Top], ...] = ()
    reused: int | None = None
    num_tokens = 0
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
        elif output.name == "sequence_length":
            num_tokens = int(memoryview(raw).cast("i")[0])
    if len(log_probs) > len(ids):  # an engine may repeat those of the tokens before
        log_probs = log_probs[received : received + len(ids)]
    return Reply(ids, log_probs, top, prompt, reused, num_tokens)


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

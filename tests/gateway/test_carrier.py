"""A replica and its carrier, in front of streams that the test plays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.triton.conftest import id_request
from tests.waiting import GENEROUS
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation import upstream
from trtqwen.gateway.generation.upstream import Replica, Reply
from trtqwen.triton.contract import EXTENSIONS
from trtqwen.triton.messages import infer_response


class Stream:
    """A stream of grpc.aio; the test puts its messages."""

    def __init__(self, request: Any) -> None:
        self.own = json.loads(request.parameters[EXTENSIONS].string_param or "{}")
        self.outputs = [output.name for output in request.outputs]
        self.cancelled = self._over = False
        self._messages: asyncio.Queue[Any] = asyncio.Queue()

    async def read(self) -> Any:
        message = await self._messages.get()
        if isinstance(message, BaseException):
            raise message
        self._over = message is grpc.aio.EOF
        return message

    def cancel(self) -> None:
        if not self._over:
            self.cancelled = True
            self._messages.put_nowait(asyncio.CancelledError())

    def rows(self, *rows: tuple[int, int]) -> None:
        """Send rows of a carrier."""
        self._put({"output_ids": np.array([rows], np.int32)})

    def tokens(self, *ids: int, before: int = 0, final: bool = False) -> None:
        """Send an answer's tokens, after those that a carrier brings."""
        length = np.array([[before + len(ids)]], np.int32)
        tensors = {"output_ids": np.array([[ids]], np.int32).reshape(1, 1, -1), "sequence_length": length}
        self._put(tensors, final=final)
        if final:
            self.end()

    def end(self, problem: BaseException | None = None) -> None:
        self._messages.put_nowait(problem or grpc.aio.EOF)

    def _put(self, tensors: dict[str, Any], *, final: bool = False) -> None:
        message = service_pb2.ModelStreamInferResponse(infer_response=infer_response(tensors))
        if final:
            message.infer_response.parameters["triton_final_response"].bool_param = True
        self._messages.put_nowait(message)


class Stub:
    """A server; `streams` are those that were opened and not taken by the test yet."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()

    def ModelStreamInfer(self, requests: AsyncIterator[Any], timeout: float | None, metadata: Any) -> Stream:
        [request] = _drained(requests)
        stream = Stream(request)
        self.streams.put_nowait(stream)
        return stream

    async def next(self) -> Stream:
        return await asyncio.wait_for(self.streams.get(), GENEROUS)


def _drained(requests: AsyncIterator[Any]) -> list[Any]:
    """The items of an iterator that never waits."""
    found = []
    while True:
        try:
            requests.__anext__().send(None)  # type: ignore[attr-defined]
        except StopIteration as item:
            found.append(item.value)
        except StopAsyncIteration:
            return found


async def answer(replica: Replica, **inputs: Any) -> list[int]:
    """The tokens of an answer that a carrier may bring."""
    found: list[int] = []
    async with aclosing(replica.generate("1", id_request([5], 8, **inputs), 60, carried=True)) as replies:
        async for reply in replies:
            found += reply.token_ids
    return found


async def at_first_token(stub: Stub, replica: Replica) -> tuple[AsyncGenerator[Reply, None], Stream, Stream]:
    """An answer whose first token, 10, has been read, its carrier and its own stream."""
    replies = replica.generate("1", id_request([5], 8), 60, carried=True)
    task = asyncio.ensure_future(anext(replies))
    carrier, own = await stub.next(), await stub.next()
    carrier.rows((own.own["carrier"][1], 10))
    assert (await task).token_ids == (10,)
    return replies, carrier, own


Play = Callable[[Stub, Replica], Awaitable[None]]


def play(test: Play) -> None:
    async def run() -> None:
        stub = Stub()
        await asyncio.wait_for(test(stub, Replica("played:1", stub)), GENEROUS)

    asyncio.run(run())


def test_the_end_waits_for_tokens_that_it_overtook() -> None:
    async def test(stub: Stub, replica: Replica) -> None:
        first, second = asyncio.create_task(answer(replica)), asyncio.create_task(answer(replica))
        carrier, one, two = [await stub.next() for _ in range(3)]
        assert one.own["carrier"][0] == two.own["carrier"][0] == carrier.own["carry"]
        number, other = one.own["carrier"][1], two.own["carrier"][1]
        one.tokens(13, before=3, final=True)
        carrier.rows((number, 10), (other, 20), (number, 11))
        await asyncio.sleep(0)
        two.tokens(before=1, final=True)
        assert await second == [20]
        assert not first.done()
        carrier.rows((number, 12), (other, 21))  # nobody waits for the last one
        assert await first == [10, 11, 12, 13]
        carrier.end()

    play(test)


def test_an_engine_without_that_carrier_answers_on_the_answers_own_stream() -> None:
    async def test(stub: Stub, replica: Replica) -> None:
        task = asyncio.create_task(answer(replica))
        carrier, own = await stub.next(), await stub.next()
        carrier.end()
        own.tokens(10, 11)
        own.tokens(12, final=True)
        assert await task == [10, 11, 12]

    play(test)


def test_an_engine_without_carriers_is_asked_for_one_once() -> None:
    async def test(stub: Stub, replica: Replica) -> None:
        task = asyncio.create_task(answer(replica))
        carrier, own = await stub.next(), await stub.next()
        carrier.tokens(0, final=True)  # the token that it was asked for
        own.tokens(10, final=True)
        assert await task == [10]
        task = asyncio.create_task(answer(replica))
        own = await stub.next()
        assert (own.own, own.outputs) == ({}, ["output_ids"])
        own.tokens(11, final=True)
        assert await task == [11]

    play(test)


def test_a_carrier_that_breaks_ends_its_answers_and_the_next_one_gets_another() -> None:
    async def test(stub: Stub, replica: Replica) -> None:
        task = asyncio.create_task(answer(replica))
        carrier, own = await stub.next(), await stub.next()
        carrier.rows((own.own["carrier"][1], 10))
        carrier.end(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata()))
        with pytest.raises(ApiError) as caught:
            await task
        assert (caught.value.status, own.cancelled) == (503, True)
        task = asyncio.create_task(answer(replica))
        another, own = await stub.next(), await stub.next()
        assert own.own["carrier"][0] == another.own["carry"] != carrier.own["carry"]
        own.tokens(final=True)
        assert await task == []
        another.end()

    play(test)


@pytest.mark.parametrize("ends", [True, False])
def test_the_answer_of_a_client_that_leaves_is_stopped(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is cancelled only if it does not end."""
    monkeypatch.setattr(upstream, "_LEAVING_SECONDS", GENEROUS if ends else 0.01)

    async def test(stub: Stub, replica: Replica) -> None:
        replies, carrier, own = await at_first_token(stub, replica)
        await replies.aclose()
        stop = await stub.next()
        assert stop.own == {"carrier": own.own["carrier"]}
        stop.tokens(final=True)
        if ends:
            own.tokens(before=1, final=True)
        carrier.rows((own.own["carrier"][1], 11))
        carrier.end()
        await replica.close()
        assert (own.cancelled, carrier.cancelled) == (not ends, False)

    play(test)


def test_a_finished_stream_is_not_cancelled_though_its_client_leaves_at_a_token_before() -> None:
    async def test(stub: Stub, replica: Replica) -> None:
        replies, carrier, own = await at_first_token(stub, replica)
        own.tokens(11, before=1, final=True)
        await asyncio.sleep(0)  # it has arrived
        await asyncio.sleep(0)
        await replies.aclose()
        assert not own.cancelled
        carrier.end()
        await replica.close()

    play(test)


def test_an_answer_with_more_than_tokens_is_not_carried() -> None:
    async def test(stub: Stub, replica: Replica) -> None:
        task = asyncio.create_task(answer(replica, return_log_probs=np.array([[True]])))
        own = await stub.next()
        assert own.own == {}
        own.end()
        assert await task == []

    play(test)


def test_a_stalled_answer_ends_though_its_own_stream_has_ended() -> None:
    """Its tokens were lost."""

    async def test(stub: Stub, replica: Replica) -> None:
        task = asyncio.create_task(answer(replica))
        carrier, own = await stub.next(), await stub.next()
        own.tokens(11, before=1, final=True)
        while not task.done():
            await asyncio.sleep(0)
            replica.abort_stalled(-1.0, 0.0)
        with pytest.raises(ApiError, match="sent no token"):
            await task
        carrier.end()

    play(test)


def test_an_answer_that_was_aborted_while_its_client_did_not_read_ends() -> None:
    async def test(stub: Stub, replica: Replica) -> None:
        replies = replica.generate("1", id_request([5], 8), 60, carried=True)
        task = asyncio.ensure_future(anext(replies))
        carrier, own = await stub.next(), await stub.next()
        carrier.rows((own.own["carrier"][1], 10))
        own.tokens(12, before=2, final=True)
        assert (await task).token_ids == (10,)
        replica.abort_all(ApiError(503, "stopping", "stopping"))
        with pytest.raises(ApiError, match="stopping"):
            await anext(replies)
        carrier.end()

    play(test)

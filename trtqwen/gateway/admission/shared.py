"""A worker's side of the admission in `broker.py`: gates and the rates of callers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from trtqwen.gateway.admission.admission import Ticket
from trtqwen.gateway.admission.auth import CALLER, Authenticator, Caller
from trtqwen.gateway.admission.gate import Gate, GatePlan, Prefixes, stopping
from trtqwen.gateway.errors import ApiError


class Link:
    """A worker's connection to the broker.

    Raises:
        ConnectionError: by every call, if the broker has ended.
    """

    def __init__(self, calls: socket.socket, news: socket.socket) -> None:
        self._calls = calls.makefile("rwb")
        self._news = news
        self._next = 0
        self.waiting: dict[int, asyncio.Future[int]] = {}  # for the turns of tickets, by their numbers

    def call(self, method: str, *arguments: Any) -> Any:
        """Ask the broker and wait for its answer.

        Raises:
            ApiError: what the broker's gate or caller raised.
        """
        self._calls.write(json.dumps([method, *arguments]).encode() + b"\n")
        self._calls.flush()
        line = self._calls.readline()
        if not line:
            raise ConnectionError("the gateway's first process has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise ApiError(**answer["error"])
        return answer["value"]

    def numbers(self, count: int) -> range:
        """Numbers for new tickets."""
        self._next += count
        return range(self._next - count, self._next)

    async def listen(self) -> None:
        """Process the broker's news until it ends."""
        reader, _ = await asyncio.open_connection(sock=self._news)
        while line := await reader.readline():
            self._told(json.loads(line))
        os.kill(os.getpid(), signal.SIGTERM)  # without the broker no request is served

    def _told(self, news: dict[str, Any]) -> None:
        future = self.waiting.get(news["ticket"])
        if future is None or future.done():
            return
        if "error" in news:
            future.set_exception(ApiError(**news["error"]))
        else:
            future.set_result(news["replica"])


class SharedGate(Gate):
    """A worker's view of one of the broker's gates.

    Args:
        engine: names the gate, the same in all workers.
        plan: how the broker makes it, unless another worker has opened it before.
    """

    def __init__(self, link: Link, engine: str, plan: GatePlan) -> None:
        self._link = link
        self._engine = engine
        self._draining = False
        self._numbers: dict[Ticket, int] = {}
        link.call("open", engine, asdict(plan))

    @property
    def idle(self) -> bool:
        return not self._numbers

    def close(self) -> None:
        self._link.call("close", self._engine)

    def has_free_turn(self, tokens: int) -> bool:
        return not self._draining and bool(self._link.call("has_free_turn", self._engine, tokens))

    def check_room(self, priority: int = 0) -> None:
        if self._draining:
            raise stopping()
        self._link.call("check_room", self._engine, priority, _limits())

    @contextmanager
    def places(
        self, token_counts: Sequence[int], prefixes: Sequence[Prefixes] = (), priority: int = 0
    ) -> Iterator[list[Ticket]]:
        if self._draining:
            raise stopping()
        tickets = [Ticket(count) for count in token_counts]
        numbers, engine = self._link.numbers(len(tickets)), self._engine
        self._link.call("arrive", engine, list(numbers), list(token_counts), list(prefixes), priority, _limits())
        try:
            loop = asyncio.get_running_loop()
            self._numbers |= zip(tickets, numbers, strict=True)
            self._link.waiting |= {number: loop.create_future() for number in numbers}
            yield tickets
        finally:
            for ticket in tickets:
                self.give_back(ticket)

    async def turn(self, ticket: Ticket, deadline: float) -> int:
        number = self._numbers[ticket]
        future = self._link.waiting[number]
        if not future.done():
            self._link.call("turn", number, deadline)
        return await future

    def give_back(self, ticket: Ticket, lasted: float | None = None) -> None:
        number = self._numbers.pop(ticket, None)
        if number is not None:
            self._link.waiting.pop(number).cancel()
            self._link.call("give_back", number, lasted)

    def grow(self, ticket: Ticket, tokens: int) -> None:
        if ticket in self._numbers:
            self._link.call("grow", self._numbers[ticket], tokens)

    def set_up(self, replica: int, up: bool) -> None:
        self._link.call("set_up", self._engine, replica, up)

    def send_away(self, failure: ApiError) -> None:
        for number in self._numbers.values():
            future = self._link.waiting[number]
            if not future.done():
                future.set_exception(failure)
                future.exception()  # its request may not wait for it yet


class SharedCaller(Caller):
    """A worker's view of a caller, whose rates the broker keeps."""

    def __init__(self, own: Caller, digest: bytes, link: Link) -> None:
        super().__init__(own.name, most_in_flight=own.most_in_flight, most_queued=own.most_queued)
        self._digest = digest.hex()
        self._link = link

    def charge_request(self, now: float) -> None:
        self._link.call("charge", self._digest, "request", 1)

    def charge_tokens(self, tokens: int, now: float) -> None:
        self._link.call("charge", self._digest, "tokens", tokens)

    def take_tokens(self, tokens: int) -> None:
        if tokens:
            self._link.call("charge", self._digest, "take", tokens)

    def refund_tokens(self, tokens: int) -> None:
        self.take_tokens(-tokens)


def shared_authenticator(own: Authenticator, link: Link) -> Authenticator:
    """Return an authenticator whose rates are in the broker. Callers without a rate do not need it."""

    def wrap(digest: bytes, caller: Caller) -> Caller:
        limited = caller.requests is not None or caller.tokens is not None
        return SharedCaller(caller, digest, link) if limited else caller

    callers = {digest: wrap(digest, caller) for digest, caller in own.callers.items()}
    return Authenticator(callers, path=own.path, wrap=wrap)


def _limits() -> dict[str, Any]:
    """Return the limits of the current request's caller for the broker's gate."""
    caller = CALLER.get()
    return {"name": caller.name, "most_in_flight": caller.most_in_flight, "most_queued": caller.most_queued}

"""One admission for several gateway workers: the process that owns the gates and the keys' rates answers theirs.

A worker has two sockets to the broker. On `calls` it asks and waits for the answer, one JSON object a line each: this
takes a tenth of a millisecond, and the gate's interface stays that of a single process. On `news` the broker tells it
when a ticket's turn has come. There is a gate for each engine: the first worker that opens it says how it is made.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

from trtqwen.gateway.admission.admission import Capacity, QueueLimits, Ticket
from trtqwen.gateway.admission.auth import CALLER, Authenticator, Caller
from trtqwen.gateway.admission.gate import Gate, GatePlan, Prefixes, stopping
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.metrics import Metrics


@dataclass
class _Shared:
    """A gate, and for each worker that has it open the replicas that work for it."""

    gate: Gate
    replicas: int
    up: dict[int, set[int]] = field(default_factory=dict)

    def show(self) -> None:
        """A replica takes requests if it works for any worker."""
        for number in range(self.replicas):
            self.gate.set_up(number, any(number in working for working in self.up.values()))


class Broker:
    """Answers the workers out of one gate for each engine, and one set of callers."""

    def __init__(self, authenticator: Authenticator, metrics: Metrics) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        self._gates: dict[str, _Shared] = {}
        self._workers = count()

    async def serve(self, calls: socket.socket, news: socket.socket) -> None:
        """Answer one worker until it ends; then all that it holds is given back."""
        worker = next(self._workers)
        reader, writer = await asyncio.open_connection(sock=calls)
        _, teller = await asyncio.open_connection(sock=news)
        session = _Session(teller)
        try:
            while line := await reader.readline():
                method, *arguments = json.loads(line)
                try:
                    answer = {"value": self._answer(worker, session, method, arguments)}
                except ApiError as problem:
                    answer = {"error": _packed(problem)}
                writer.write(json.dumps(answer).encode() + b"\n")
        except ConnectionError:
            pass
        finally:
            session.end()
            for engine in tuple(self._gates):
                self._close(worker, engine)
            writer.close()
            teller.close()

    def _answer(self, worker: int, session: _Session, method: str, arguments: Sequence[Any]) -> Any:
        if method == "charge":
            return self._charge(*arguments)
        if method in ("open", "close", "set_up", "check_room", "arrive", "has_free_turn"):
            engine, *arguments = arguments
            return self._at_gate(worker, session, method, engine, arguments)
        handlers: dict[str, Callable[..., None]] = {
            "turn": session.turn,
            "give_back": session.give_back,
            "grow": session.grow,
        }
        return handlers[method](*arguments)

    def _at_gate(
        self, worker: int, session: _Session, method: str, engine: str, arguments: Sequence[Any]
    ) -> bool | None:
        """What concerns the gate of one engine."""
        if method == "open":
            if engine not in self._gates:
                plan = _plan(arguments[0])
                self._gates[engine] = _Shared(plan.build(self._metrics), len(plan.replicas))
            self._gates[engine].up.setdefault(worker, set())
            return None
        if method == "close":
            self._close(worker, engine)
            return None
        shared = self._gates[engine]
        if method == "set_up":
            replica, up = arguments
            (shared.up[worker].add if up else shared.up[worker].discard)(replica)
            shared.show()
        elif method == "has_free_turn":
            return shared.gate.has_free_turn(arguments[0])
        else:
            *arguments, limits = arguments
            CALLER.set(Caller(**limits))
            if method == "check_room":
                shared.gate.check_room(*arguments)
            else:
                session.arrive(shared.gate, *arguments)
        return None

    def _close(self, worker: int, engine: str) -> None:
        shared = self._gates.get(engine)
        if shared is None or shared.up.pop(worker, None) is None:
            return
        if shared.up:
            shared.show()
        else:
            del self._gates[engine]
            shared.gate.close()

    def _charge(self, digest: str, what: str, tokens: int) -> None:
        self._authenticator.refresh()
        caller = self._authenticator.callers.get(bytes.fromhex(digest))
        now = time.monotonic()
        if caller is None:
            raise ApiError(401, "the API key is not known here; check it", "invalid_api_key")
        if what == "request":
            caller.charge_request(now)
        elif what == "tokens":
            caller.charge_tokens(tokens, now)
        else:
            caller.take_tokens(tokens)


@dataclass
class _Held:
    """A worker's ticket in the gate.

    Attributes:
        places: what all tickets that came together hold.
        left: how many of them are not given back yet.
        waiting: tells the worker when the turn has come.
    """

    gate: Gate
    ticket: Ticket
    places: AbstractContextManager[list[Ticket]]
    left: list[int]
    waiting: asyncio.Task[None] | None = None


class _Session:
    """What one worker holds."""

    def __init__(self, news: asyncio.StreamWriter) -> None:
        self._news = news
        self._held: dict[int, _Held] = {}

    def arrive(
        self,
        gate: Gate,
        numbers: Sequence[int],
        token_counts: Sequence[int],
        prefixes: Sequence[Prefixes],
        priority: int,
    ) -> None:
        places = gate.places(token_counts, prefixes, priority)
        tickets = places.__enter__()
        left = [len(tickets)]
        for number, ticket in zip(numbers, tickets, strict=True):
            self._held[number] = _Held(gate, ticket, places, left)

    def turn(self, number: int, deadline: float) -> None:
        held = self._held[number]

        async def wait() -> None:
            try:
                news: dict[str, Any] = {"replica": await held.gate.turn(held.ticket, deadline)}
            except ApiError as problem:
                news = {"error": _packed(problem)}
            self._news.write(json.dumps({"ticket": number, **news}).encode() + b"\n")

        held.waiting = asyncio.create_task(wait())

    def give_back(self, number: int, lasted: float | None = None) -> None:
        held = self._held.pop(number, None)
        if held is None:
            return
        if held.waiting is not None:
            held.waiting.cancel()
        held.gate.give_back(held.ticket, lasted)
        held.left[0] -= 1
        if held.left[0] == 0:
            held.places.__exit__(None, None, None)

    def grow(self, number: int, tokens: int) -> None:
        if (held := self._held.get(number)) is not None:
            held.gate.grow(held.ticket, tokens)

    def end(self) -> None:
        for number in tuple(self._held):
            self.give_back(number)


class Link:
    """A worker's end.

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
            raise _unpacked(answer["error"])
        return answer["value"]

    def numbers(self, count: int) -> range:
        """Numbers for new tickets."""
        self._next += count
        return range(self._next - count, self._next)

    async def listen(self) -> None:
        """Take in the broker's news until it ends."""
        reader, _ = await asyncio.open_connection(sock=self._news)
        while line := await reader.readline():
            self._told(json.loads(line))
        os.kill(os.getpid(), signal.SIGTERM)  # without the broker no request is served

    def _told(self, news: dict[str, Any]) -> None:
        future = self.waiting.get(news["ticket"])
        if future is None or future.done():
            return
        if "error" in news:
            future.set_exception(_unpacked(news["error"]))
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
    """The same keys, with rates that the broker keeps; callers without a rate need not ask it."""

    def wrap(digest: bytes, caller: Caller) -> Caller:
        limited = caller.requests is not None or caller.tokens is not None
        return SharedCaller(caller, digest, link) if limited else caller

    callers = {digest: wrap(digest, caller) for digest, caller in own.callers.items()}
    return Authenticator(callers, path=own.path, wrap=wrap)


def _limits() -> dict[str, Any]:
    """What the broker's gate has to know of the caller of the current request."""
    caller = CALLER.get()
    return {"name": caller.name, "most_in_flight": caller.most_in_flight, "most_queued": caller.most_queued}


def _plan(fields: dict[str, Any]) -> GatePlan:
    """A plan that came as JSON."""
    capacity, queue = Capacity(**fields.pop("capacity")), QueueLimits(**fields.pop("queue"))
    return GatePlan(replicas=tuple(fields.pop("replicas")), capacity=capacity, queue=queue, **fields)


def _packed(problem: ApiError) -> dict[str, Any]:
    retry = problem.headers.get("Retry-After")
    return {
        "status": problem.status,
        "message": problem.message,
        "code": problem.code,
        "param": problem.param,
        "retry_after": None if retry is None else int(retry),
    }


def _unpacked(fields: dict[str, Any]) -> ApiError:
    return ApiError(
        fields["status"],
        fields["message"],
        fields["code"],
        param=fields["param"],
        retry_after=fields["retry_after"],
    )

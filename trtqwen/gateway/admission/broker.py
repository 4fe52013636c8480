"""One admission for several gateway workers: the broker process owns the gates and the keys' rates.

A worker has two sockets to the broker. On `calls` it sends a question and waits for the answer, one JSON object per
line. This takes a tenth of a millisecond, and the gate keeps the interface of a single process. On `news` the broker
announces that a ticket may run. Each engine has a gate, which the first worker that opens it configures. `shared.py`
is the worker's side.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from trtqwen.gateway.admission.admission import Capacity, QueueLimits, Ticket
from trtqwen.gateway.admission.auth import CALLER, Authenticator, Caller
from trtqwen.gateway.admission.gate import Gate, GatePlan, Prefixes
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
    """Serves the workers with one gate per engine and one set of callers."""

    def __init__(self, authenticator: Authenticator, metrics: Metrics) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        self._gates: dict[str, _Shared] = {}
        self._workers = count()

    async def serve(self, calls: socket.socket, news: socket.socket) -> None:
        """Serve one worker until it ends; then release everything that it holds."""
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
                    answer = {"error": problem.arguments}
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
                news = {"error": problem.arguments}
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


def _plan(fields: dict[str, Any]) -> GatePlan:
    """Read a plan from JSON."""
    capacity, queue = Capacity(**fields.pop("capacity")), QueueLimits(**fields.pop("queue"))
    return GatePlan(replicas=tuple(fields.pop("replicas")), capacity=capacity, queue=queue, **fields)

"""The Tritons that `trtqwen serve` starts and stops for a table of models."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import InputError, TrtQwenError
from trtqwen.gateway.fleet.table import ModelTable, Target, file_state, read_table, revision
from trtqwen.system.processes import Service
from trtqwen.triton.replicas import TritonReplicas
from trtqwen.triton.server import TritonServer

_LOOK_SECONDS = 0.3
_log = logging.getLogger(__name__)
Make = Callable[[Target], TritonReplicas]


@dataclass
class Place:
    """The Tritons of one target.

    Attributes:
        making: their preparation, which reads every file of repository and engine.
        ready: servers that are ready.
        problem: why it cannot serve, and `at`, the Unix time of that.
    """

    target: Target
    making: Future[TritonReplicas] | None = None
    servers: tuple[TritonServer, ...] = ()
    ready: set[int] = field(default_factory=set)
    problem: str = ""
    at: float = 0.0

    @property
    def told(self) -> dict[str, Any]:
        """Return the state for the gateway."""
        return {
            "triton": [server.grpc_url for server in self.servers],
            "running": bool(self.servers) and len(self.ready) == len(self.servers),
            "problem": self.problem,
            "at": self.at,
        }


class Roster:
    """Follows the table: supplies the Tritons of new targets, and removes those that no gateway process uses.

    Args:
        path: of the table.
        make: prepares the Tritons of a target; takes seconds.
        used: reads the state of the gateway's processes.

    Raises:
        InputError: if the table or a repository in it cannot be used.
    """

    def __init__(self, path: Path, make: Make, used: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._path = path
        self._make = make
        self._used = used
        self._seen = file_state(path)
        self._read()
        self._looked_at = 0.0
        self._told: dict[str, Any] = {}
        self._places: dict[str, Place] = {}
        for place, target in self._wanted.items():
            self._places[place] = Place(target, servers=self._named(target, make(target)))

    @property
    def servers(self) -> tuple[TritonServer, ...]:
        """Those of the first table."""
        return tuple(server for place in self._places.values() for server in place.servers)

    @property
    def told(self) -> dict[str, Any]:
        """Return the addresses of each target's Tritons for the gateway."""
        return {name: place.told for name, place in self._places.items()}

    def arrivals(self) -> Sequence[Service]:
        if time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self._look()
        come: list[TritonServer] = []
        for place in self._places.values():
            if place.making is None or not place.making.done():
                continue
            making, place.making = place.making, None
            try:
                place.servers = self._named(place.target, making.result())
                come += place.servers
            except Exception as problem:  # none of them may end what serves
                place.problem, place.at = str(problem) or repr(problem), time.time()
        return come

    def changed(self) -> bool:
        told, self._told = self._told, self.told
        return told != self._told

    def departures(self) -> Sequence[Service]:
        told = self._used()
        gone: list[TritonServer] = []
        for name, place in [*self._places.items()]:
            if name in self._wanted or place.making is not None:
                continue
            # A process that has not read the table yet may still send requests there.
            late = any(one["revision"] != self._revision or not one["switched"] for one in told)
            addresses = {address for one in told for address in one["triton"]}
            if not late and addresses.isdisjoint(server.grpc_url for server in place.servers):
                gone += place.servers if not place.problem else ()
                del self._places[name]
        return gone

    def became_ready(self, service: Service) -> None:
        for place in self._places.values():
            place.ready |= {number for number, server in enumerate(place.servers) if server is service}

    def failed(self, service: Service, problem: TrtQwenError) -> None:
        for place in self._places.values():
            if any(server is service for server in place.servers):
                place.problem, place.at = str(problem), time.time()

    def _look(self) -> None:
        if (state := file_state(self._path)) == self._seen:
            return
        self._seen = state
        try:
            self._read()
        except InputError as problem:
            _log.error("the models are as before: %s", problem)
            return
        for name, target in self._wanted.items():
            place = self._places.get(name)
            if place is None or place.problem:  # a table that is written again is another try
                self._places[name] = Place(target, self._prepare(target))

    def _read(self) -> None:
        table = read_table(self._path)
        self._wanted, self._revision = _managed(table), revision(table)

    def _prepare(self, target: Target) -> Future[TritonReplicas]:
        """Make the Tritons of a target in a thread that does not keep this process from ending."""
        future: Future[TritonReplicas] = Future()

        def work() -> None:
            try:
                future.set_result(self._make(target))
            except Exception as problem:
                future.set_exception(problem)

        threading.Thread(target=work, name="roster", daemon=True).start()
        return future

    def _named(self, target: Target, replicas: TritonReplicas) -> tuple[TritonServer, ...]:
        for number, server in enumerate(replicas.servers):
            server.name = f"Triton of {target.name}" + (f" ({number})" if len(replicas.servers) > 1 else "")
        return replicas.servers


def _managed(table: ModelTable) -> dict[str, Target]:
    """The targets whose Tritons `serve` starts, by their places."""
    return {
        target.place: target for entry in table.models.values() for target in entry.targets if target.triton is None
    }

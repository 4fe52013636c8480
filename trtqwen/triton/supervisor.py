"""Run a server with all its services: start, watch, restart and stop them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Protocol

from trtqwen.diagnostics import ServerError, TrtQwenError
from trtqwen.system.processes import Service

_POLL_SECONDS = 0.1
_LONGEST_PAUSE = 60.0  # seconds between two attempts to restart
_STABLE_SECONDS = 300.0  # a service that ran this long begins again with a short pause
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

State = Literal["starting", "running", "restarting"]


class Roster(Protocol):
    """Engines that are added and removed while the server runs."""

    def arrivals(self) -> Sequence[Service]:
        """Return the engines to start now."""

    def changed(self) -> bool:
        """Return whether the state for the gateway has changed since the last call."""

    def departures(self) -> Sequence[Service]:
        """Return the engines to stop now, which have no requests."""

    def became_ready(self, service: Service) -> None:
        """Record that an engine serves."""

    def failed(self, service: Service, problem: TrtQwenError) -> None:
        """Record that an engine has failed before it served. It is stopped."""


class _Signalled(BaseException):
    """Raised in the main thread by a signal; not an Exception, so that no handler of failures catches it."""


@dataclass
class _Watched:
    """A service and its state.

    Attributes:
        since: start of the state, in seconds of the monotonic clock.
        retry_at: when it is started again, in state `restarting`.
        failures: number of failures since it was last stable.
        newcomer: it was added to a running server, which continues if it does not start.
    """

    service: Service
    state: State = "starting"
    since: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    was_ready: bool = False
    newcomer: bool = False


class Supervisor:
    """Runs engines and, once they serve, a gateway in front of them.

    Args:
        gateway: started when every engine serves; stopped before them.
        restart: start again what has ended by itself, with a pause that doubles up to a minute; otherwise its end
            ends everything.
        on_ready: called once, when everything serves.
        say: prints a line for the user.
        on_change: called with `state`, `restarts` and `cause` whenever an engine begins to run or to restart.
        roster: adds and removes engines.
    """

    def __init__(
        self,
        engines: Sequence[Service],
        gateway: Service | None = None,
        *,
        restart: bool = False,
        on_ready: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
        on_change: Callable[[Mapping[str, object]], None] = lambda state: None,
        roster: Roster | None = None,
    ) -> None:
        self._engines = [_Watched(engine) for engine in engines]
        self._gateway = _Watched(gateway) if gateway else None
        self._restart = restart
        self._on_ready = on_ready
        self._say = say
        self._on_change = on_change
        self._roster = roster
        self._leaving: list[threading.Thread] = []
        self._restarts = 0
        self._cause = ""

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP; for the main thread. A second signal stops without waiting.

        Raises:
            ServerError: if a service ends by itself and is not started again.
        """
        drain = False
        with self._signals() as stopping:
            try:
                for engine in self._engines:
                    self._start(engine)
                announced = False
                while True:
                    self._look_after_all()
                    if not announced and all(one.state == "running" for one in self._all):
                        announced = True
                        self._on_ready()
                    time.sleep(_POLL_SECONDS)
            except _Signalled:
                drain = True
            finally:
                stopping.set()
                self._stop(drain=drain)

    @property
    def _all(self) -> list[_Watched]:
        return [*self._engines, *([self._gateway] if self._gateway else [])]

    def _look_after_all(self) -> None:
        if self._roster is not None and (self._gateway is None or self._gateway.was_ready):
            self._follow(self._roster)
        for engine in tuple(self._engines):
            self._look_after(engine)
        if self._gateway is None:
            return
        serving = all(engine.state == "running" for engine in self._engines)
        if self._gateway.since:
            if self._gateway.state == "starting" and not serving:
                self._gateway.since = time.monotonic()  # it waits for an engine that has ended and starts again
            self._look_after(self._gateway)
        elif serving:
            self._start(self._gateway)

    def _follow(self, roster: Roster) -> None:
        """Start added engines, and stop removed ones."""
        for service in roster.arrivals():
            newcomer = _Watched(service, newcomer=True)
            self._engines.append(newcomer)
            self._say(f"starting {service.name}")
            try:
                self._start(newcomer)
            except TrtQwenError as problem:
                self._give_up(newcomer, problem)
        if roster.changed():
            self._report()
        for service in roster.departures():
            [left] = [one for one in self._engines if one.service is service]
            self._engines.remove(left)
            self._say(f"stopping {service.name}: no model needs it")
            thread = threading.Thread(target=service.stop, kwargs={"drain": left.state == "running"}, daemon=True)
            self._leaving.append(thread)
            thread.start()

    def _give_up(self, newcomer: _Watched, problem: TrtQwenError) -> None:
        self._engines.remove(newcomer)
        newcomer.service.stop(drain=False)
        self._say(f"{newcomer.service.name} did not start: {problem}")
        if self._roster is not None:
            self._roster.failed(newcomer.service, problem)
        self._report()

    def _look_after(self, one: _Watched) -> None:
        now = time.monotonic()
        try:
            if one.state == "restarting":
                if now >= one.retry_at:
                    self._start(one)
                return
            one.service.check()
            if one.state == "starting":
                if one.service.answers():
                    self._became_ready(one)
                elif now - one.since > one.service.start_seconds:
                    raise one.service.late()
        except ServerError as problem:
            self._failed(one, problem)

    def _start(self, one: _Watched) -> None:
        one.state, one.since = "starting", time.monotonic()
        one.service.start()

    def _became_ready(self, one: _Watched) -> None:
        if one.was_ready:
            self._say(f"{one.service.name} serves again after {time.monotonic() - one.since:.0f} s")
        one.state, one.since, one.was_ready = "running", time.monotonic(), True
        if self._roster is not None:
            self._roster.became_ready(one.service)
        self._report()

    def _failed(self, one: _Watched, problem: ServerError) -> None:
        if one.newcomer and not one.was_ready:
            self._give_up(one, problem)
            return
        if not self._restart or not one.was_ready:
            raise problem
        now = time.monotonic()
        if one.state == "running" and now - one.since > _STABLE_SECONDS:
            one.failures = 0
        one.failures += 1
        pause = min(_LONGEST_PAUSE, 2.0 ** (one.failures - 1))
        one.service.stop(drain=False)
        one.state, one.since, one.retry_at = "restarting", now, time.monotonic() + pause
        self._restarts += 1
        self._cause = problem.what
        self._say(f"{one.service.name} has ended: {problem.what}; starting it again in {pause:g} s")
        self._report()

    def _report(self) -> None:
        running = all(one.state == "running" for one in self._engines if one.was_ready or not one.newcomer)
        state = "running" if running else "restarting"
        self._on_change({"state": state, "restarts": self._restarts, "cause": self._cause})

    def _stop(self, *, drain: bool) -> None:
        """Stop the gateway, then the engines, each even if another one fails."""
        problems: list[BaseException] = []
        for phase in ([self._gateway] if self._gateway else []), self._engines:
            draining = [one for one in phase if drain and _may_have_clients(one)]
            if draining:
                seconds = max(one.service.stop_seconds for one in draining)
                self._say(
                    f"stopping {draining[0].service.name}: requests in progress have up to {seconds:g} s; press "
                    "Ctrl-C again to stop now"
                )
            with ThreadPoolExecutor(max(1, len(phase))) as pool:
                done = [pool.submit(one.service.stop, drain=one in draining) for one in phase]
                problems += [problem for future in done if (problem := future.exception())]
        for thread in self._leaving:
            thread.join()
        if problems:
            raise problems[0]

    @contextmanager
    def _signals(self) -> Iterator[threading.Event]:
        """Turn the first signal into `_Signalled`. A signal during the stop kills all processes."""
        stopping = threading.Event()

        def interrupt(number: int, frame: FrameType | None) -> None:
            if not stopping.is_set():
                stopping.set()
                raise _Signalled
            for one in self._all:
                one.service.kill()

        previous = {
            number: signal.signal(number, interrupt)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN  # as `nohup` sets SIGHUP
        }
        try:
            yield stopping
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _may_have_clients(one: _Watched) -> bool:
    """Return whether requests may be in progress. The service may have become ready since the last check."""
    if not one.since or one.state == "restarting":
        return False
    return one.was_ready or one.service.answers()

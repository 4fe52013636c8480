"""Runs a server with all its parts: starts them, watches them, restarts what has ended, and stops them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from trtqwen.diagnostics import ServerError
from trtqwen.system.processes import Service

_POLL_SECONDS = 0.1
_LONGEST_PAUSE = 60.0  # seconds between two attempts to restart
_STABLE_SECONDS = 300.0  # a service that ran this long begins again with a short pause
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

State = Literal["starting", "running", "restarting"]


class _Signalled(BaseException):
    """Raised in the main thread by a signal; not an Exception, so that no handler of failures catches it."""


@dataclass
class _Watched:
    """A service and where it is in its life.

    Attributes:
        since: when the state began, in seconds of the monotonic clock.
        retry_at: when it is started again, in state `restarting`.
        failures: how often it has ended since it was last stable.
    """

    service: Service
    state: State = "starting"
    since: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    was_ready: bool = False


class Supervisor:
    """Runs engines and, once they serve, a gateway in front of them.

    Args:
        gateway: started when every engine serves; stopped before them.
        restart: start again what has ended by itself, with a pause that doubles up to a minute; otherwise its end
            ends everything.
        on_ready: called once, when everything serves.
        say: prints a line for the person who watches.
        on_change: called with `state`, `restarts` and `cause` whenever an engine begins to run or to restart.
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
    ) -> None:
        self._engines = [_Watched(engine) for engine in engines]
        self._gateway = _Watched(gateway) if gateway else None
        self._restart = restart
        self._on_ready = on_ready
        self._say = say
        self._on_change = on_change
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
        for engine in self._engines:
            self._look_after(engine)
        if self._gateway is None:
            return
        if self._gateway.since:
            self._look_after(self._gateway)
        elif all(engine.state == "running" for engine in self._engines):
            self._start(self._gateway)

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
                    raise ServerError(one.service.late())
        except ServerError as problem:
            self._failed(one, problem)

    def _start(self, one: _Watched) -> None:
        one.state, one.since = "starting", time.monotonic()
        one.service.start()

    def _became_ready(self, one: _Watched) -> None:
        if one.was_ready:
            self._say(f"{one.service.name} serves again after {time.monotonic() - one.since:.0f} s")
        one.state, one.since, one.was_ready = "running", time.monotonic(), True
        self._report()

    def _failed(self, one: _Watched, problem: ServerError) -> None:
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
        running = all(engine.state == "running" for engine in self._engines)
        state = "running" if running else "restarting"
        self._on_change({"state": state, "restarts": self._restarts, "cause": self._cause})

    def _stop(self, *, drain: bool) -> None:
        """Stop the gateway, then the engines; each regardless of the others."""
        problems: list[BaseException] = []
        for phase in ([self._gateway] if self._gateway else []), self._engines:
            running = [one for one in phase if one.since and one.state != "restarting"]
            if drain and running and running[0].was_ready:
                seconds = max(one.service.stop_seconds for one in running)
                self._say(
                    f"stopping {running[0].service.name}: requests in progress have up to {seconds:g} s; press "
                    "Ctrl-C again to stop now"
                )
            with ThreadPoolExecutor(max(1, len(phase))) as pool:
                done = [pool.submit(one.service.stop, drain=drain and one.was_ready) for one in phase]
                problems += [problem for future in done if (problem := future.exception())]
        if problems:
            raise problems[0]

    @contextmanager
    def _signals(self) -> Iterator[threading.Event]:
        """Turn the first signal into `_Signalled`; one that comes while everything stops kills what is left."""
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

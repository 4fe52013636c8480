"""The supervisor with services that are made to fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping

import pytest

from tests.processes import in_child
from trtqwen.diagnostics import ServerError
from trtqwen.system.processes import Service
from trtqwen.triton.supervisor import Supervisor


class Fake(Service):
    """Serves at once; ends by itself as often as it is told to."""

    name = "the fake"

    def __init__(self, ends: int = 0, stop_takes: float = 0) -> None:
        self.starts = 0
        self.stops: list[bool] = []
        self.ends = ends
        self.killed = threading.Event()
        self.stop_takes = stop_takes

    def start(self) -> None:
        self.starts += 1

    def answers(self) -> bool:
        return True

    def check(self) -> None:
        if self.starts <= self.ends and self.starts and self.was_asked():
            raise ServerError("it fell over")

    def was_asked(self) -> bool:
        self.asked = getattr(self, "asked", 0) + 1
        return self.asked % 3 == 0  # after it has served for a moment

    def stop(self, *, drain: bool = True) -> None:
        self.stops.append(drain)
        self.killed.wait(self.stop_takes)

    def kill(self) -> None:
        self.killed.set()


def signal_soon(number: signal.Signals, seconds: float = 0.3) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_the_gateway_and_then_the_engines(number: signal.Signals) -> None:
    engine, gateway, said = Fake(), Fake(), list[str]()
    Supervisor([engine], gateway, say=said.append, on_ready=lambda: signal_soon(number)).run()
    assert (engine.stops, gateway.stops) == ([True], [True])
    assert len([line for line in said if "up to 30 s; press Ctrl-C again" in line]) == 2


@pytest.mark.parametrize("serves", [True, False])
def test_what_serves_since_the_last_look_is_drained_too(serves: bool) -> None:
    """Clients of a server that became ready a moment ago lost their answers to a signal."""

    class Late(Fake):
        signaled = False

        def answers(self) -> bool:
            if not self.signaled:
                self.signaled = True
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)  # the signal ends it
            return serves

    engine, said = Late(), list[str]()
    Supervisor([engine], say=said.append).run()
    assert engine.stops == [serves]
    assert any("requests in progress" in line for line in said) == serves


def test_what_ends_by_itself_ends_everything_without_a_drain() -> None:
    engine, gateway = Fake(ends=1), Fake()
    with pytest.raises(ServerError, match="it fell over"):
        Supervisor([engine], gateway).run()
    assert engine.stops == [False]
    assert gateway.stops in ([], [False])


def test_a_second_signal_stops_at_once() -> None:
    engine = Fake(stop_takes=60)

    def two() -> None:
        signal_soon(signal.SIGINT)
        signal_soon(signal.SIGINT, 0.8)

    begun = time.monotonic()
    Supervisor([engine], on_ready=two).run()
    assert engine.killed.is_set()
    assert time.monotonic() - begun < 30


def test_a_signal_never_interrupts_a_stop() -> None:
    def work() -> None:
        engine = Fake(ends=1, stop_takes=1)
        signal_soon(signal.SIGTERM, 0.6)
        with pytest.raises(ServerError, match="it fell over"):
            Supervisor([engine]).run()
        assert engine.stops == [False]

    assert in_child(work) == 0


def test_what_ends_is_started_again_with_longer_pauses() -> None:
    engine, states, said = Fake(ends=2), list[Mapping[str, object]](), list[str]()

    def on_change(state: Mapping[str, object]) -> None:
        states.append(state)
        if engine.starts == 3 and state["state"] == "running":
            signal_soon(signal.SIGTERM, 0)

    Supervisor([engine], restart=True, say=said.append, on_change=on_change).run()
    assert [state["state"] for state in states] == ["running", "restarting", "running", "restarting", "running"]
    assert states[-1]["restarts"] == 2
    assert [line for line in said if "it fell over; starting it again in 1 s" in line]
    assert [line for line in said if "it fell over; starting it again in 2 s" in line]
    assert engine.stops == [False, False, True]


def test_an_engine_that_ends_before_the_gateway_serves_is_waited_for() -> None:
    """The gateway's time to start does not run while no engine serves."""
    engine = Fake()

    class Gateway(Fake):
        name, start_seconds = "the gateway", 0.5  # less than the pause before the engine starts again

        def start(self) -> None:
            super().start()
            engine.ends = 1

        def answers(self) -> bool:
            return engine.starts == 2

    gateway = Gateway()
    Supervisor([engine], gateway, restart=True, on_ready=lambda: signal_soon(signal.SIGTERM, 0)).run()
    assert (engine.starts, gateway.starts, gateway.stops) == (2, 1, [True])

"""The watchdog with processes that sleep, compute, or would compute if the machine let them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.slow import slow
from tests.waiting import wait_for
from trtqwen.system.processes import busy_nanoseconds
from trtqwen.triton.watchdog import Watchdog

PROGRAM = """
import contextlib, os, sys, time
kind = sys.argv[1]
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if kind == "starved":  # runs when nothing else does on this core, also where sessions share cores as groups
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write("19")
print(flush=True)
while True:
    if kind == "sleeps":
        time.sleep(1)
"""


class Silent:
    """An engine whose last step ended long ago."""

    def silence(self) -> float:
        return 100


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr("trtqwen.triton.watchdog._SAMPLE_SECONDS", 1.0)
    with ExitStack() as started:
        yield started


def start(run: ExitStack, kind: str) -> int:
    """A process in a session of its own."""
    command = [sys.executable, "-c", PROGRAM, kind]
    process = run.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
    run.callback(process.kill)
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


def test_an_engine_that_sleeps_hangs(run: ExitStack) -> None:
    watchdog = Watchdog([start(run, "sleeps")], Silent(), 30, strict=False)
    assert watchdog.hung() is None
    assert wait_for(lambda: watchdog.hung() == "no step of the engine has ended for 100 s")


@pytest.mark.parametrize("kind", [slow("computes"), "starved"])
def test_an_engine_that_computes_or_waits_for_a_cpu_does_not_hang(run: ExitStack, kind: str) -> None:
    if kind == "starved":
        if not busy_nanoseconds(os.getpid()):
            pytest.skip("this kernel does not tell how long threads wait for a CPU")
        start(run, "computes")
    session = start(run, kind)
    watchdog = Watchdog([session], Silent(), 30, strict=False)
    end = time.monotonic() + 2.5  # two samples
    while time.monotonic() < end:
        assert watchdog.hung() is None
        time.sleep(0.05)
    late = Watchdog([session], Silent(), 5, strict=False)
    assert late.hung() is not None  # ten times the limit

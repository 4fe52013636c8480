"""Ranks that start quickly: tests of the executor start dozens of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    started = Nursery("trtqwen.executor.plain_runner", "trtqwen.executor.worker")
    yield started
    started.stop()


@pytest.fixture(scope="module", autouse=True)
def quick_ranks(nursery: Nursery) -> Iterator[None]:
    """Without GPUs, executors of the test process fork their ranks from one that has imported PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        # CUDA does not work in a fork of a process that has looked for devices.
        if not Path("/dev/nvidiactl").exists():
            patch.setattr("trtqwen.executor.executor.subprocess", nursery)
        yield


@pytest.fixture
def real_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start ranks as users do: for tests of their processes."""
    monkeypatch.setattr("trtqwen.executor.executor.subprocess", subprocess)

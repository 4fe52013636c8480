"""Ranks that start quickly: tests of the executor start dozens of them."""

from __future__ import annotations

import subprocess

import pytest


@pytest.fixture(scope="module", autouse=True)
def forked_ranks(quick_ranks: None) -> None:
    """All tests here fork their ranks, but for those that take `real_ranks`."""


@pytest.fixture
def real_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start ranks as users do: for tests of their processes."""
    monkeypatch.setattr("trtqwen.executor.executor.subprocess", subprocess)

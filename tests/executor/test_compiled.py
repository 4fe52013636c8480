"""Kernels are compiled once on a machine."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from pathlib import Path

import pytest

from tests.processes import fork

KERNEL = """
from trtqwen.executor.cpu.jit import compiled


@compiled()
def double(value):
    return 2 * value
"""


def test_of_processes_that_start_together_one_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubling.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    double = importlib.import_module("doubling").double
    ready = multiprocessing.get_context("fork").Barrier(3)

    def compile_it() -> None:
        ready.wait(60)
        assert double(2) == 4
        (tmp_path / f"misses{os.getpid()}").write_text(str(double.stats.cache_misses.total()))

    children = [fork(compile_it) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert sum(int(path.read_text()) for path in tmp_path.glob("misses*")) == 1

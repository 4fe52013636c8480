"""The collectives between processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ranks import Nursery


@pytest.mark.parametrize(("size", "stages"), [(1, 3), (2, 2)])
def test_exchanges(nursery: Nursery, tmp_path: Path, size: int, stages: int) -> None:
    program = [sys.executable, "-m", "tests.executor.exchanges"]
    ranks = [
        nursery.Popen([*program, str(rank), str(size), str(stages), str(tmp_path / "meet")])
        for rank in range(size * stages)
    ]
    assert [rank.wait() for rank in ranks] == [0] * size * stages, [rank.stderr.read() for rank in ranks]
    assert [rank.stdout.read().splitlines()[-1] for rank in ranks] == ["fine"] * size * stages

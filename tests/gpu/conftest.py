"""Everything here needs a card; run `pytest tests/gpu tests/executor/cuda` on a machine that has one."""

from __future__ import annotations

import pytest
import torch

collect_ignore_glob: list[str] = []


@pytest.fixture(scope="session", autouse=True)
def _card() -> None:
    """Skip before the other fixtures compute anything."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

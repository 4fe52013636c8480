"""Kernels run here under the Triton language's interpreter (see tests/conftest.py), or on a card if there is one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

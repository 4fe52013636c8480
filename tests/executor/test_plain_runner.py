from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

from trtqwen.executor.inputs import Counts, StepInputs
from trtqwen.executor.model import Qwen2Model
from trtqwen.executor.plain_runner import PlainRunner


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Model:
    """Notes how many threads a step has."""

    threads: tuple[int, ...] = ()

    def forward(self, batch: Any) -> None:
        self.threads += (torch.get_num_threads(),)


@pytest.mark.usefixtures("two_threads")
def test_small_steps_take_one_thread_and_large_ones_all() -> None:
    model = Model()
    runner = PlainRunner(cast(Qwen2Model, model), torch.device("cpu"), 1_000_000)
    for tokens in (1, 64, 8, 512):
        counts = Counts(tokens, 1, 0, 1, 1)
        runner.launch(StepInputs(counts, np.zeros(counts.total, np.int32)), torch.zeros(2, dtype=torch.int64))
    assert model.threads == (1, 2, 1, 2)


@pytest.mark.usefixtures("two_threads")
def test_one_token_of_a_large_model_takes_all_threads() -> None:
    model = Model()
    counts = Counts(1, 1, 1, 1, 1)
    inputs = StepInputs(counts, np.zeros(counts.total, np.int32))
    PlainRunner(cast(Qwen2Model, model), torch.device("cpu"), 200_000_000).launch(inputs, torch.zeros(2))
    assert model.threads == (2,)

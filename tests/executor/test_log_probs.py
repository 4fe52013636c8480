"""Log probabilities of prompts and of the most likely tokens, checked against transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import bundled_model
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import OutputConfig, Request, Response, TopLogProbs

PROMPT = (100, 7, 2000, 31, 400, 5, 77, 912, 13, 8, 1200, 64, 90, 3, 2, 1, 17, 3000, 45)


def table(top: TopLogProbs, count: int) -> tuple[Any, Any]:
    ids = np.frombuffer(top.ids, np.int32).reshape(-1, count)
    return ids, np.frombuffer(top.log_probs, np.float32).reshape(-1, count)


@pytest.fixture(scope="module")
def answers(bundled_engine: Callable[..., Path]) -> dict[str, list[Response]]:
    """A prompt read in one piece, in two (the last of one token), and a prompt of one token."""
    found: dict[str, list[Response]] = {}
    output = OutputConfig(return_log_probs=True, num_top_log_probs=4, return_prompt_log_probs=True)
    for name, prompt, limits in (
        ("whole", PROMPT, {}),
        ("chunked", PROMPT[:17], {"max_num_tokens": 16}),
        ("one", PROMPT[:1], {}),
    ):
        with Executor(bundled_engine(**limits), ExecutorConfig(enable_kv_cache_reuse=True)) as executor:
            for _ in range(2):  # the second time, blocks could be reused
                request = Request(id=name, input_token_ids=prompt, max_tokens=3, output=output)
                [found[name]] = executor.generate([request])
    return found


@pytest.mark.parametrize(("name", "length"), [("whole", 19), ("chunked", 17), ("one", 1)])
def test_they_are_those_of_transformers(answers: dict[str, list[Response]], name: str, length: int) -> None:
    responses = [response for response in answers[name] if response.token_ids]
    chosen = [token for response in responses for token in response.token_ids]
    ids = torch.tensor([[*PROMPT[:length], *chosen]])
    with torch.inference_mode():
        expected = bundled_model()(ids).logits[0].log_softmax(-1)
    [prompt] = [response.prompt_log_probs for response in responses if response.prompt_log_probs is not None]
    values = np.frombuffer(prompt.log_probs, np.float32)
    assert len(values) == length
    assert np.isnan(values[0])
    wanted = expected[:-1].gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(values[1:], wanted[: length - 1], atol=1e-3)
    assert prompt.top is not None
    top_ids, top_values = table(prompt.top, 4)
    assert (top_ids[0] == -1).all()
    best = expected.topk(4)
    np.testing.assert_allclose(top_values[1:], best.values[: length - 1], atol=1e-3)
    assert (top_ids[1:] != best.indices[: length - 1].numpy()).sum() <= 2  # two may be equally likely
    last = slice(length - 1, length - 1 + len(chosen))
    log_probs = [value for response in responses for value in response.log_probs]
    np.testing.assert_allclose(log_probs, wanted[last], atol=1e-3)
    tops = [table(response.top_log_probs, 4)[1] for response in responses if response.top_log_probs is not None]
    np.testing.assert_allclose(np.concatenate(tops), best.values[last], atol=1e-3)

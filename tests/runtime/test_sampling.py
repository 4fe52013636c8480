from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtqwen.runtime.request import Request, SamplingConfig
from trtqwen.runtime.sampling import Sampler
from trtqwen.runtime.scheduler import Sequence

PROMPT = (1, 2, 3)


def sequence(name: str = "a", output: tuple[int, ...] = (), end_id: int | None = None, **sampling: Any) -> Sequence:
    request = Request(
        id=name, input_token_ids=PROMPT, max_tokens=9, end_id=end_id, sampling=SamplingConfig(**sampling)
    )
    return Sequence(request, 9, [*PROMPT, *output])


def draw(logits: torch.Tensor, subject: Sequence, count: int) -> Counter[int | None]:
    sampler = Sampler()
    return Counter(sampler.sample(logits.clone()[None], [subject])[0] for _ in range(count))


@pytest.mark.parametrize("options", [{}, {"top_k": 1, "temperature": 9.0}, {"top_p": 0.9, "temperature": 0.0}])
def test_greedy_takes_the_likeliest(options: dict[str, Any]) -> None:
    assert draw(torch.tensor([0.1, 3.0, 2.9]), sequence(**options), 5) == {1: 5}


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_p": 1.0, "temperature": 2.0}, [TemperatureLogitsWarper(2.0)]),
        (
            {"top_k": 5, "top_p": 0.8, "temperature": 0.7},
            [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_draws_follow_the_distribution_of_transformers(options: dict[str, Any], processors: list[Any]) -> None:
    torch.manual_seed(3)
    logits = torch.randn(12) * 2
    scores = LogitsProcessorList(processors)(torch.tensor([PROMPT]), logits.clone()[None])[0]
    expected = scores.softmax(-1)
    counts = draw(logits, sequence(seed=5, **options), 4000)
    assert all(expected[token] > 0 for token in counts)
    for token, probability in enumerate(expected.tolist()):
        assert abs(counts[token] / 4000 - probability) < 0.03


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 8)
    subject = sequence(output=(5, 5), repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([subject.token_ids]), logits.clone())
    changed = logits.clone()
    Sampler().sample(changed, [subject])
    torch.testing.assert_close(changed, expected)


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = torch.zeros(1, 8)
    Sampler().sample(logits, [sequence(output=(5, 5, 6), presence_penalty=1.0, frequency_penalty=0.5)])
    assert logits[0].tolist() == [0, 0, 0, 0, 0, -2.0, -1.5, 0]


def test_min_tokens_forbids_the_end() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert Sampler().sample(logits.clone(), [sequence(end_id=1, min_tokens=1)]) == [2]
    assert Sampler().sample(logits.clone(), [sequence(end_id=1, min_tokens=1, output=(0,))]) == [1]


def test_a_seed_decides_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(0)
    steps = torch.randn(6, 20)

    def run(neighbours: int, seed: int) -> list[int | None]:
        sampler = Sampler()
        others = [sequence(f"other{i}", top_p=1.0, seed=i) for i in range(neighbours)]
        subject = sequence("subject", top_p=1.0, seed=seed)
        return [sampler.sample(row.repeat(neighbours + 1, 1), [*others, subject])[-1] for row in steps]

    assert run(0, 42) == run(3, 42)
    assert run(0, 42) != run(0, 43)


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, float("inf")], [1.0, 0.0]])
    assert Sampler().sample(logits, [sequence(name) for name in "abc"]) == [None, None, 0]


@pytest.mark.parametrize(
    "bad", [{"top_p": 1.5}, {"top_k": -1}, {"temperature": -1.0}, {"repetition_penalty": 0.0}, {"seed": -1}]
)
def test_values_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**bad)

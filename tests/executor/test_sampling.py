from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.slow import slow
from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import OutputConfig, Request, SamplingConfig
from trtqwen.executor.sampling import Sampled, Sampler
from trtqwen.executor.sequence import SequenceState

PROMPT = (1, 2, 3)


FIELDS = ("end_id", "bad_words", "embedding_bias", "guided_decoding")


def sequence(name: str = "a", output: tuple[int, ...] = (), asks: Any = None, **options: Any) -> SequenceState:
    fields = {field: options.pop(field) for field in FIELDS if field in options}
    if asks is not None:
        fields["output"] = asks
    slot = options.pop("slot", 0)
    request = Request(id=name, input_token_ids=PROMPT, max_tokens=9, sampling=SamplingConfig(**options), **fields)
    return SequenceState(request, 9, [*PROMPT, *output], slot=slot)


def sampler() -> Sampler:
    return Sampler(4, torch.device("cpu"))


def token(result: Sampled | RequestError) -> int:
    assert isinstance(result, Sampled), result
    return result.token_id


def draw(logits: torch.Tensor, subject: SequenceState, count: int) -> Counter[int]:
    """Tokens drawn for the first `count` places of an answer."""
    subject_sampler, drawn = sampler(), []
    for _ in range(count):
        drawn.append(token(subject_sampler.sample(logits.clone()[None], [subject])[0]))
        subject.token_ids.append(0)
    return Counter(drawn)


@pytest.mark.parametrize("options", [{}, {"top_k": 1, "temperature": 9.0}, {"top_p": 0.9, "temperature": 0.0}])
def test_greedy_takes_the_likeliest(options: dict[str, Any]) -> None:
    assert draw(torch.tensor([0.1, 3.0, 2.9]), sequence(**options), 5) == {1: 5}


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        slow({"top_k": 3}, [("TopKLogitsWarper", 3)]),
        slow({"top_p": 0.7}, [("TopPLogitsWarper", 0.7)]),
        slow({"top_p": 1.0, "temperature": 2.0}, [("TemperatureLogitsWarper", 2.0)]),
        slow({"min_p": 0.2}, [("MinPLogitsWarper", 0.2)]),
        (
            {"min_p": 0.1, "top_p": 0.95, "temperature": 1.5},
            [("TemperatureLogitsWarper", 1.5), ("TopPLogitsWarper", 0.95), ("MinPLogitsWarper", 0.1)],
        ),
        (
            {"top_k": 5, "top_p": 0.8, "temperature": 0.7},
            [("TemperatureLogitsWarper", 0.7), ("TopKLogitsWarper", 5), ("TopPLogitsWarper", 0.8)],
        ),
    ],
)
def test_draws_follow_the_distribution_of_transformers(
    options: dict[str, Any], processors: list[tuple[str, float]]
) -> None:
    import transformers

    torch.manual_seed(3)
    logits = torch.randn(12) * 2
    theirs = transformers.LogitsProcessorList(getattr(transformers, name)(value) for name, value in processors)
    scores = theirs(torch.tensor([PROMPT]), logits.clone()[None])[0]
    expected = scores.softmax(-1)
    counts = draw(logits, sequence(seed=5, **options), 4000)
    assert all(expected[token] > 0 for token in counts)
    for token, probability in enumerate(expected.tolist()):
        assert abs(counts[token] / 4000 - probability) < 0.03


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(1)
    logits = torch.randn(1, 8)
    subject = sequence(output=(5, 5), repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([subject.token_ids]), logits.clone())
    changed = logits.clone()
    sampler().sample(changed, [subject])
    torch.testing.assert_close(changed, expected)


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = torch.zeros(1, 8)
    sampler().sample(logits, [sequence(output=(5, 5, 6), presence_penalty=1.0, frequency_penalty=0.5)])
    assert logits[0].tolist() == [0, 0, 0, 0, 0, -2.0, -1.5, 0]


def test_min_tokens_forbids_the_end() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert sampler().sample(logits.clone(), [sequence(end_id=1, min_tokens=1)]) == [Sampled(2)]
    assert sampler().sample(logits.clone(), [sequence(end_id=1, min_tokens=1, output=(0,))]) == [Sampled(1)]


def test_a_seed_decides_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(0)
    steps = torch.randn(6, 20)

    def run(neighbours: int, seed: int) -> list[int]:
        subject_sampler, tokens = sampler(), []
        others = [sequence(f"other{i}", top_p=1.0, seed=i, slot=i) for i in range(neighbours)]
        subject = sequence("subject", top_p=1.0, seed=seed, slot=3)
        for row in steps:
            results = subject_sampler.sample(row.repeat(neighbours + 1, 1), [*others, subject])
            tokens.append(token(results[-1]))
            subject.token_ids.append(tokens[-1])
        return tokens

    assert run(0, 42) == run(3, 42)
    assert run(0, 42) != run(0, 43)


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, float("inf")], [1.0, 0.0]])
    *broken, fine = sampler().sample(logits, [sequence(name, slot=slot) for slot, name in enumerate("abc")])
    assert ["not finite" in str(result) for result in broken] == [True, True]
    assert fine == Sampled(0)


@pytest.mark.parametrize("output", [(), (4,), (4, 5), (5, 5, 5)])
def test_bad_words_are_forbidden_as_by_transformers(output: tuple[int, ...]) -> None:
    from transformers import NoBadWordsLogitsProcessor

    words = ((6,), (4, 7), (4, 5, 2), (5, 5), (3, 1))  # the last one begins in the prompt
    subject = sequence(output=output, bad_words=words)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=[99])
    expected = processor(torch.tensor([subject.token_ids]), torch.zeros(1, 8))
    changed = torch.zeros(1, 8)
    sampler().sample(changed, [subject])
    torch.testing.assert_close(changed, expected)


def test_a_bias_is_added_before_the_choice() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, 1.0])
    assert draw(logits, sequence(embedding_bias={2: 0.2}), 1) == {2: 1}
    assert draw(logits, sequence(embedding_bias={1: -math.inf, 2: -math.inf}, top_p=1.0), 60).keys() == {0, 3}


def test_a_request_that_leaves_no_token_fails_alone() -> None:
    forbidding = sequence("a", bad_words=((0,), (1,)), embedding_bias={2: -math.inf, 3: -math.inf}, top_p=1.0)
    overflowing = sequence("b", embedding_bias={1: 3e38, 2: 3e38}, slot=1)
    results = sampler().sample(torch.full((3, 4), 3e38), [forbidding, overflowing, sequence("c", slot=2)])
    assert ["no token is left to choose" in str(result) for result in results] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_warming_up_leaves_no_trace(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    subject = sequence(output=(5,), temperature=0.7, top_p=0.9, repetition_penalty=1.3)
    fresh, warm = sampler(), sampler()
    warm.warm_up(logits.clone())
    assert warm.sample(logits.clone(), [subject]) == fresh.sample(logits.clone(), [subject])


def test_a_penalty_that_overflows_still_wins() -> None:
    wanting = sequence("a", output=(1, 2, 2), frequency_penalty=-1e39)
    refusing = sequence("b", output=(0, 1, 1, 2), frequency_penalty=1e39, slot=1)
    results = sampler().sample(torch.zeros(2, 4), [wanting, refusing])
    assert [result.token_id for result in results if isinstance(result, Sampled)] == [1, 3]


class BrokenGuide:
    def mask(self, row: torch.Tensor) -> None:
        raise RequestError("broken")

    def accept(self, token_id: int) -> None:
        raise AssertionError


def test_a_guide_that_fails_fails_alone() -> None:
    subject = sampler()
    subject.guide("a", BrokenGuide())
    broken, fine = subject.sample(
        torch.eye(2), [sequence("a", guided_decoding={"guide_type": "json"}), sequence("b", slot=1)]
    )
    assert str(broken) == "broken"
    assert fine == Sampled(1)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-9])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    assert draw(torch.tensor([-1.0, 3e4, 2e4]), sequence(top_p=1.0, temperature=temperature), 5) == {1: 5}


def test_log_probs_and_logits_are_the_models_own() -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 12)
    own = logits.clone()
    asks = OutputConfig(return_log_probs=True, return_generation_logits=True)
    subject = sequence(asks=asks, output=(5,), temperature=3.0, top_p=0.9, presence_penalty=2.0, bad_words=((0,),))
    [result] = sampler().sample(logits, [subject])
    assert isinstance(result, Sampled)
    assert result.log_prob == pytest.approx(own[0].log_softmax(-1)[result.token_id].item(), rel=1e-5)
    torch.testing.assert_close(result.logits, own[0])
    assert sampler().sample(own, [sequence()])[0] == Sampled(int(own.argmax()))


@pytest.mark.parametrize(
    "bad", [{"top_p": 1.5}, {"top_k": -1}, {"temperature": -1.0}, {"repetition_penalty": 0.0}, {"seed": -1}]
)
def test_values_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**bad)

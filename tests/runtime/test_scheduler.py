from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtqwen.errors import RequestError
from trtqwen.runtime.request import FinishReason, Request, Response, SamplingConfig
from trtqwen.runtime.scheduler import Scheduler, SchedulerConfig

BASE = {
    "max_batch_size": 4,
    "max_num_tokens": 16,
    "max_seq_len": 32,
    "tokens_per_block": 4,
    "num_blocks": 32,
    "vocab_size": 100,
}


def scheduler(**changes: object) -> Scheduler:
    return Scheduler(SchedulerConfig(**(BASE | changes)))  # type: ignore[arg-type]


def request(name: str, length: int, max_tokens: int = 4, **options: object) -> Request:
    return Request(id=name, input_token_ids=tuple(range(length)), max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def step(subject: Scheduler, token: int = 7) -> tuple[list[tuple[str, int, int]], list[Response]]:
    """Take one step in which the model always says `token`; returns (id, start, length) of each chunk."""
    planned = subject.schedule()
    assert planned is not None
    responses = subject.update(planned, {chunk.request_id: token for chunk in planned.chunks if chunk.samples})
    return [(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in planned.chunks], responses


def test_requests_share_steps_and_join_in_flight() -> None:
    subject = scheduler()
    subject.add(request("a", 3))
    assert step(subject)[0] == [("a", 0, 3)]
    subject.add(request("b", 5))
    assert step(subject)[0] == [("a", 3, 1), ("b", 0, 5)]
    assert step(subject)[0] == [("a", 4, 1), ("b", 5, 1)]
    assert step(subject)[1][0].finish_reason is FinishReason.LENGTH
    assert step(subject)[0] == [("b", 7, 1)]
    assert subject.idle
    assert subject.schedule() is None


def test_long_prompts_are_cut_into_block_sized_chunks() -> None:
    subject = scheduler(max_num_tokens=10)
    subject.add(request("a", 3, max_tokens=9))
    step(subject)
    subject.add(request("b", 21))
    assert step(subject)[0] == [("a", 3, 1), ("b", 0, 8)]  # 9 tokens are left: two whole blocks
    assert step(subject)[0] == [("a", 4, 1), ("b", 8, 8)]
    assert step(subject)[0] == [("a", 5, 1), ("b", 16, 5)]  # the last chunk may end anywhere
    assert step(subject)[0] == [("a", 6, 1), ("b", 21, 1)]


def test_without_chunked_context_a_prompt_waits_for_a_step_that_holds_it() -> None:
    subject = scheduler(max_num_tokens=10, enable_chunked_context=False)
    subject.add(request("a", 3, max_tokens=3))
    step(subject)
    subject.add(request("b", 10))
    assert step(subject)[0] == [("a", 3, 1)]
    assert step(subject)[0] == [("a", 4, 1)]
    assert step(subject)[0] == [("b", 0, 10)]
    with pytest.raises(RequestError, match=r"11 context tokens exceed max_num_tokens \(10\)"):
        subject.add(request("c", 11))


def test_guaranteed_no_evict_waits_until_the_whole_answer_fits() -> None:
    subject = scheduler(num_blocks=4)
    subject.add(request("a", 4, max_tokens=8))  # 11 tokens: 3 blocks
    subject.add(request("b", 4, max_tokens=8))
    for _ in range(8):
        assert [name for name, *_ in step(subject)[0]] == ["a"]
    assert [name for name, *_ in step(subject)[0]] == ["b"]
    assert subject.stats().paused == 0


def test_max_utilization_starts_both_and_pauses_the_younger() -> None:
    subject = scheduler(num_blocks=4, batch_scheduler_policy="max_utilization")
    subject.add(request("a", 4, max_tokens=8))
    subject.add(request("b", 4, max_tokens=8))
    seen = []
    while not subject.idle:
        seen.append(step(subject)[0])
    assert seen[0] == [("a", 0, 4), ("b", 0, 4)]
    assert subject.stats().paused == 1
    again = next(chunk for chunks in seen[1:] for chunk in chunks if chunk[0] == "b" and chunk[1] == 0)
    assert again[2] > 4  # prompt and the answer so far are computed anew


def test_the_batch_is_limited() -> None:
    subject = scheduler(max_batch_size=2)
    for name in "abc":
        subject.add(request(name, 2))
    assert [name for name, *_ in step(subject)[0]] == ["a", "b"]
    assert subject.stats().waiting == 1


def test_end_ids_are_left_out_and_stop_words_kept() -> None:
    subject = scheduler()
    subject.add(request("a", 2, end_id=7))
    assert step(subject)[1] == [Response(request_id="a", finish_reason=FinishReason.END_ID)]
    subject.add(request("b", 2, stop_words=((7, 7),)))
    assert step(subject)[1] == [Response(request_id="b", token_ids=(7,))]
    assert step(subject)[1] == [Response(request_id="b", token_ids=(7,), finish_reason=FinishReason.STOP_WORDS)]


def test_a_stop_word_does_not_reach_back_into_the_prompt() -> None:
    subject = scheduler()
    subject.add(Request(id="a", input_token_ids=(1, 7), max_tokens=3, stop_words=((7, 7),)))
    assert step(subject)[1][0].finish_reason is None


def test_min_tokens_holds_the_end_back() -> None:
    subject = scheduler()
    subject.add(request("a", 2, max_tokens=9, stop_words=((7,),), sampling=SamplingConfig(min_tokens=2)))
    reasons = [step(subject)[1][0].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.STOP_WORDS]


@pytest.mark.parametrize(
    ("changes", "bad", "message"),
    [
        ({}, request("x", 32), r"Prompt length \(32\) exceeds maximum input length \(31\)"),
        ({"num_blocks": 2}, request("x", 5, 8), "exceed the KV cache of 8 tokens"),
        ({"vocab_size": 3}, request("x", 5), "token id 4 is outside the vocabulary of 3"),
        (
            {"enable_chunked_context": False, "batch_scheduler_policy": "max_utilization"},
            request("x", 10, 9),
            "18 context tokens exceed",
        ),
    ],
)
def test_what_can_never_be_served_is_refused(changes: dict[str, object], bad: Request, message: str) -> None:
    subject = scheduler(**changes)
    with pytest.raises(RequestError, match=message):
        subject.add(bad)
    assert subject.idle


def test_the_queue_and_ids_are_limited() -> None:
    subject = scheduler(max_queue_size=1)
    subject.add(request("a", 2))
    with pytest.raises(RequestError, match="Maximum queue size of 1 has been reached, please try again later"):
        subject.add(request("b", 2))
    step(subject)
    subject.add(request("b", 2))
    with pytest.raises(RequestError, match="in flight already"):
        subject.add(request("a", 2))


def test_max_tokens_is_lowered_to_what_max_seq_len_leaves() -> None:
    subject = scheduler()
    subject.add(request("a", 30, max_tokens=1000))
    tokens = 0
    while not subject.idle:
        tokens += sum(len(response.token_ids) for response in step(subject)[1])
    assert tokens == 2


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 25), st.integers(1, 12)), min_size=1, max_size=16),
    st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
    st.integers(10, 40),
    st.integers(4, 20),
)
def test_every_request_ends_with_all_its_tokens(
    shapes: list[tuple[int, int]], policy: str, num_blocks: int, max_num_tokens: int
) -> None:
    subject = scheduler(batch_scheduler_policy=policy, num_blocks=num_blocks, max_num_tokens=max_num_tokens)
    for index, (length, max_tokens) in enumerate(shapes):
        subject.add(request(str(index), length, max_tokens))
    counts = [0] * len(shapes)
    steps = 0
    while not subject.idle:
        for response in step(subject)[1]:
            counts[int(response.request_id)] += len(response.token_ids)
        steps += 1
        assert steps < 3000
    assert counts == [min(max_tokens, 32 - length) for length, max_tokens in shapes]
    assert subject.pool.num_free == num_blocks


class AnyMix(RuleBasedStateMachine):
    """Requests come, run, finish, fail and are cancelled in any order; blocks are never shared and never lost."""

    @initialize(
        policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
        chunked=st.booleans(),
        num_blocks=st.integers(1, 24),
        max_num_tokens=st.integers(4, 32),
        queue=st.integers(0, 6),
    )
    def start(self, policy: str, chunked: bool, num_blocks: int, max_num_tokens: int, queue: int) -> None:
        self.subject = scheduler(
            batch_scheduler_policy=policy,
            enable_chunked_context=chunked,
            num_blocks=num_blocks,
            max_num_tokens=max_num_tokens,
            max_queue_size=queue,
        )
        self.names: list[str] = []

    @rule(length=st.integers(1, 34), max_tokens=st.integers(1, 20))
    def come(self, length: int, max_tokens: int) -> None:
        name = str(len(self.names))
        try:
            self.subject.add(request(name, length, max_tokens, end_id=3, stop_words=((5, 5),)))
        except RequestError:
            assert name not in self.subject
        self.names.append(name)

    @rule(token=st.sampled_from([3, 5, 9]))
    def step(self, token: int) -> None:
        planned = self.subject.schedule()
        if planned is None:
            assert self.subject.idle
            return
        config = self.subject.config
        assert sum(len(chunk.token_ids) for chunk in planned.chunks) <= config.max_num_tokens
        assert len(planned.chunks) <= config.max_batch_size
        for chunk in planned.chunks:
            assert len(chunk.block_ids) >= math.ceil(chunk.end / config.tokens_per_block)
        self.subject.update(planned, {chunk.request_id: token for chunk in planned.chunks if chunk.samples})

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        was_there = name in self.subject
        assert (self.subject.cancel(name) is not None) == was_there

    @rule()
    def fail(self) -> None:
        responses = self.subject.fail_all("broken")
        assert all(response.error == "broken" for response in responses)
        assert self.subject.pool.num_free == self.subject.pool.num_blocks

    @invariant()
    def blocks_are_owned_once(self) -> None:
        if not hasattr(self, "subject"):
            return
        owned = [block for name in self.names if name in self.subject for block in self.subject[name].block_ids]
        assert len(owned) == len(set(owned)) == self.subject.pool.num_blocks - self.subject.pool.num_free
        if self.subject.idle:
            assert not owned

    def teardown(self) -> None:
        if hasattr(self, "subject"):
            for _ in range(3000):
                planned = self.subject.schedule()
                if planned is None:
                    break
                self.subject.update(planned, {chunk.request_id: 9 for chunk in planned.chunks if chunk.samples})
            assert self.subject.idle
            assert self.subject.pool.num_free == self.subject.pool.num_blocks


TestAnyMix = AnyMix.TestCase
TestAnyMix.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)

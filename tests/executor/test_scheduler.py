from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtqwen.diagnostics import RequestError
from trtqwen.executor.request import FinishReason, OutputConfig, Request, Response, SamplingConfig
from trtqwen.executor.scheduler import Scheduler, SchedulerConfig
from trtqwen.executor.sequence import Step

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
    generated = subject.update(planned, {chunk.request_id: token for chunk in planned.chunks if chunk.samples})
    responses = [one.response() for one in generated]
    return [(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in planned.chunks], responses


class PlayedCache:
    """Plays the tensors behind the blocks. An entry depends on all tokens up to its own: it is that very text."""

    def __init__(self, subject: Scheduler) -> None:
        self._subject = subject
        self._written: dict[tuple[int, int], tuple[int, ...]] = {}

    def compute(self, planned: Step, names: Iterable[str]) -> None:
        """What a step reads was computed from the tokens before it; what it writes nobody else holds."""
        size = self._subject.config.tokens_per_block
        held = [self._subject[name].block_ids for name in names if name in self._subject]
        for chunk in planned.chunks:
            text = tuple(self._subject[chunk.request_id].token_ids)
            slots = [(chunk.block_ids[position // size], position % size) for position in range(chunk.end)]
            for position in range(chunk.start):
                assert self._written[slots[position]] == text[: position + 1]
            for position in range(chunk.start, chunk.end):
                self._written[slots[position]] = text[: position + 1]
                assert sum(slots[position][0] in blocks for blocks in held) == 1

    def check_holders(self, names: Iterable[str]) -> None:
        """A block is free exactly if no sequence has it; without reuse no two have the same."""
        subject = self._subject
        held = [block for name in names if name in subject for block in subject[name].block_ids]
        assert len(set(held)) == subject.pool.num_blocks - subject.pool.num_free
        assert len(set(held)) == len(held) or subject.config.enable_kv_cache_reuse


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


def test_prompts_get_a_share_of_a_step_while_others_generate() -> None:
    subject = scheduler(max_num_tokens=64, max_seq_len=128, context_share=12)
    subject.add(request("a", 3, max_tokens=9))
    step(subject)
    subject.add(request("b", 20))
    subject.add(request("c", 6))
    assert step(subject)[0] == [("a", 3, 1), ("b", 0, 12)]
    assert step(subject)[0] == [("a", 4, 1), ("b", 12, 8), ("c", 0, 4)]
    # The share grows with the batch, as the steps of a large one take long anyway.
    assert step(subject)[0] == [("a", 5, 1), ("b", 20, 1), ("c", 4, 2)]
    subject.add(request("d", 40))
    assert step(subject)[0] == [("a", 6, 1), ("b", 21, 1), ("c", 6, 1), ("d", 0, 24)]


def test_prompts_that_fill_one_step_are_computed_one_by_one_where_nobody_generates() -> None:
    subject = scheduler(max_num_tokens=64, max_seq_len=128, context_share=12)
    for name, length in [("a", 10), ("b", 10), ("c", 30)]:
        subject.add(request(name, length))
    assert step(subject)[0] == [("a", 0, 10), ("b", 0, 10)]  # 12 tokens are more than a, and no prompt is cut


def test_prompts_that_fill_more_than_one_step_get_whole_steps_until_as_many_generate_as_wait() -> None:
    subject = scheduler(max_num_tokens=24, max_seq_len=128, context_share=8)
    subject.add(request("a", 24, max_tokens=9))
    for name in "bc":
        subject.add(request(name, 24, max_tokens=9))
    assert step(subject)[0] == [("a", 0, 24)]
    assert step(subject)[0] == [("a", 24, 1), ("b", 0, 20)]  # one generates, two wait; chunks are whole blocks
    assert step(subject)[0] == [("a", 25, 1), ("b", 20, 4), ("c", 0, 16)]
    assert step(subject)[0] == [("a", 26, 1), ("b", 24, 1), ("c", 16, 8)]  # two generate, one waits


def test_prompts_without_room_in_the_batch_do_not_lengthen_steps() -> None:
    subject = scheduler(max_batch_size=2, max_num_tokens=24, max_seq_len=128, context_share=8)
    for name, length in [("a", 3), ("b", 40), ("c", 40), ("d", 40)]:
        subject.add(request(name, length, max_tokens=9))
    assert step(subject)[0] == [("a", 0, 3), ("b", 0, 20)]
    assert step(subject)[0] == [("a", 3, 1), ("b", 20, 8)]  # b alone fits into a step


def test_a_share_cuts_nothing_without_chunked_context() -> None:
    subject = scheduler(max_num_tokens=32, context_share=8, enable_chunked_context=False)
    subject.add(request("a", 3))
    step(subject)
    subject.add(request("b", 20))
    assert step(subject)[0] == [("a", 3, 1), ("b", 0, 20)]


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
    st.integers(8, 40),
    st.integers(4, 20),
    st.booleans(),
    st.sampled_from([0, 4, 9]),
)
def test_every_request_ends_with_all_its_tokens(
    shapes: list[tuple[int, int]], policy: str, num_blocks: int, max_num_tokens: int, reuse: bool, share: int
) -> None:
    """All prompts begin alike, so with reuse most blocks are shared."""
    subject = scheduler(
        batch_scheduler_policy=policy,
        num_blocks=num_blocks,
        max_num_tokens=max_num_tokens,
        enable_kv_cache_reuse=reuse,
        context_share=share,
    )
    cache, names = PlayedCache(subject), [str(index) for index in range(len(shapes))]
    for index, (length, max_tokens) in enumerate(shapes):
        subject.add(request(str(index), length, max_tokens))
    counts = [0] * len(shapes)
    steps = 0
    while not subject.idle:
        planned = subject.schedule()
        assert planned is not None
        cache.compute(planned, names)
        sampled = {chunk.request_id: 50 + steps % 3 for chunk in planned.chunks if chunk.samples}
        for one in subject.update(planned, sampled):
            counts[int(one.request_id)] += one.token_id is not None
        cache.check_holders(names)
        steps += 1
        assert steps < 3000
    assert counts == [min(max_tokens, 32 - length) for length, max_tokens in shapes]
    assert subject.pool.num_free == num_blocks


def test_a_prompts_blocks_are_found_again_while_and_after_it_runs() -> None:
    subject = scheduler(enable_kv_cache_reuse=True)
    subject.add(request("a", 11, max_tokens=3))
    assert step(subject)[0] == [("a", 0, 11)]
    subject.add(request("b", 9, max_tokens=1))
    assert step(subject)[0] == [("a", 11, 1), ("b", 8, 1)]  # two blocks of four are a's
    assert subject.stats().reused_blocks == 2
    while not subject.idle:
        step(subject)
    assert subject.pool.num_free == 32
    subject.add(request("c", 11, max_tokens=1))
    assert step(subject)[0] == [("c", 8, 3)]


def test_the_last_prompt_token_is_always_computed() -> None:
    subject = scheduler(enable_kv_cache_reuse=True)
    subject.add(request("a", 8, max_tokens=2))
    step(subject)
    subject.add(request("b", 8, max_tokens=2))
    assert step(subject)[0] == [("a", 8, 1), ("b", 4, 4)]


def test_an_answer_is_the_beginning_of_the_next_turn() -> None:
    subject = scheduler(enable_kv_cache_reuse=True)
    subject.add(request("a", 5, max_tokens=8))
    while not subject.idle:
        step(subject, token=7)
    following = (*range(5), *[7] * 8, 9, 9)
    subject.add(Request(id="b", input_token_ids=following, max_tokens=1))
    assert step(subject)[0] == [("b", 12, 3)]


def test_the_longest_unused_blocks_are_taken_first_and_a_beginning_outlives_its_end() -> None:
    subject = scheduler(enable_kv_cache_reuse=True, num_blocks=6)

    def run(*token_ids: int) -> int:
        subject.add(Request(id="x", input_token_ids=token_ids, max_tokens=1))
        reused = step(subject)[0][0][1]
        assert subject.idle
        return reused

    assert run(*range(13)) == 0  # fills three blocks and a part of the fourth
    assert run(*range(50, 63)) == 0  # takes three unused ones and the last of the first text
    assert run(*range(13)) == 8
    assert run(*range(50, 63)) == 8


def test_whoever_wants_context_logits_computes_the_whole_prompt() -> None:
    subject = scheduler(enable_kv_cache_reuse=True)
    for name in "ab":
        output = OutputConfig(return_context_logits=True)
        subject.add(request(name, 9, max_tokens=1, output=output))
        planned = subject.schedule()
        assert planned is not None
        assert [(chunk.start, chunk.num_logits) for chunk in planned.chunks] == [(0, 9)]
        subject.update(planned, {name: 7})


def test_logits_beyond_what_can_be_sent_are_refused() -> None:
    subject = scheduler(max_seq_len=32, vocab_size=5_000_000)
    output = OutputConfig(return_context_logits=True, return_generation_logits=True)
    with pytest.raises(RequestError, match="the logits of 20 tokens are 381 MiB, and at most 256 MiB are returned"):
        subject.add(request("a", 16, max_tokens=4, output=output))
    subject.add(request("b", 16, max_tokens=4))


@pytest.mark.parametrize("options", [{"bad_words": ((7, 100),)}, {"embedding_bias": {100: 1.0}}])
def test_ids_outside_the_vocabulary_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="token id 100 is outside the vocabulary of 100"):
        scheduler().add(request("a", 4, **options))


class AnyMix(RuleBasedStateMachine):
    """Requests come, run, finish, fail and are cancelled in any order. Blocks are never lost; they are shared only
    where sequences begin alike, and whatever a step reads was computed from the very tokens before it."""

    @initialize(
        policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
        chunked=st.booleans(),
        num_blocks=st.integers(1, 24),
        max_num_tokens=st.integers(4, 32),
        queue=st.integers(0, 6),
        reuse=st.booleans(),
        share=st.sampled_from([0, 4, 9]),
    )
    def start(
        self, policy: str, chunked: bool, num_blocks: int, max_num_tokens: int, queue: int, reuse: bool, share: int
    ) -> None:
        self.subject = scheduler(
            batch_scheduler_policy=policy,
            enable_chunked_context=chunked,
            num_blocks=num_blocks,
            max_num_tokens=max_num_tokens,
            max_queue_size=queue,
            context_share=share,
            enable_kv_cache_reuse=reuse,
        )
        self.cache = PlayedCache(self.subject)
        self.names: list[str] = []

    @rule(length=st.integers(1, 34), max_tokens=st.integers(1, 20), turn=st.integers(1, 34))
    def come(self, length: int, max_tokens: int, turn: int) -> None:
        """Prompts are alike up to `turn`, or all the way."""
        name = str(len(self.names))
        token_ids = tuple(position if position < turn else 50 + turn for position in range(length))
        try:
            self.subject.add(
                Request(id=name, input_token_ids=token_ids, max_tokens=max_tokens, end_id=3, stop_words=((5, 5),))
            )
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
        self.cache.compute(planned, self.names)
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
    def blocks_are_free_or_owned(self) -> None:
        if not hasattr(self, "subject"):
            return
        self.cache.check_holders(self.names)
        if self.subject.idle:
            assert self.subject.pool.num_free == self.subject.pool.num_blocks

    def teardown(self) -> None:
        if hasattr(self, "subject"):
            for _ in range(3000):
                planned = self.subject.schedule()
                if planned is None:
                    break
                self.cache.compute(planned, self.names)
                self.subject.update(planned, {chunk.request_id: 9 for chunk in planned.chunks if chunk.samples})
            assert self.subject.idle
            assert self.subject.pool.num_free == self.subject.pool.num_blocks


TestAnyMix = AnyMix.TestCase
TestAnyMix.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)

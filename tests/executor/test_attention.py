"""The fast path against the plain one, and the plain one against PyTorch's own attention."""

from __future__ import annotations

from array import array

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtqwen.executor.attention import AttentionBatch, PlainAttention
from trtqwen.executor.attention.cpu import CpuAttention
from trtqwen.executor.inputs import pack
from trtqwen.executor.request import Request
from trtqwen.executor.sequence import Chunk, SequenceState, Step

BLOCK, HEAD_SIZE = 4, 8
CPU = torch.device("cpu")
spans = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6)


def chunk(
    name: str, token_ids: tuple[int, ...], start: int, blocks: tuple[int, ...], num_logits: int = 1, slot: int = 0
) -> Chunk:
    sequence = SequenceState(Request(id=name, input_token_ids=(1,), max_tokens=1), 1, [1], slot=slot)
    return Chunk(sequence, token_ids, start, array("i", blocks), samples=num_logits > 0, num_logits=num_logits)


def make_batch(lengths: list[tuple[int, int]], seed: int) -> AttentionBatch:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(seed)).tolist()
    chunks = []
    lengths = sorted(lengths, key=lambda span: span[1] > 1)
    for index, (start, count) in enumerate(lengths):
        blocks = tuple(order.pop() for _ in range(-(-(start + count) // BLOCK)))
        chunks.append(chunk(str(index), tuple(range(count)), start, blocks))
    return AttentionBatch(pack(Step(tuple(chunks)), BLOCK), CPU)


@settings(max_examples=30, deadline=None)
@given(spans, st.sampled_from([(4, 4), (4, 2), (8, 1)]), st.integers(0, 9))
def test_the_fast_path_agrees_with_the_plain_one(
    lengths: list[tuple[int, int]], heads: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    batch = make_batch(lengths, seed)
    query = torch.randn(len(batch.token_ids), heads[0], HEAD_SIZE)
    keys, values = torch.randn(2, 128, heads[1], BLOCK, HEAD_SIZE)
    fast = CpuAttention()(query, keys, values, batch)
    torch.testing.assert_close(fast, PlainAttention()(query, keys, values, batch), atol=1e-5, rtol=1e-5)


def test_the_plain_path_is_causal_attention() -> None:
    """One unbroken sequence in order of blocks is ordinary causal attention."""
    torch.manual_seed(0)
    batch = AttentionBatch(pack(Step((chunk("a", tuple(range(8)), 0, (2, 5)),)), BLOCK), CPU)
    query, key, value = torch.randn(3, 8, 2, HEAD_SIZE)
    keys, values = torch.zeros(2, 8, 2, BLOCK, HEAD_SIZE)
    for cache, tensor in ((keys, key), (values, value)):
        cache[2], cache[5] = tensor[:4].transpose(0, 1), tensor[4:].transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True
    ).transpose(0, 1)
    torch.testing.assert_close(PlainAttention()(query, keys, values, batch), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_lays_tokens_out_by_position() -> None:
    shown = chunk("c", (5, 6), 0, (0,), num_logits=2, slot=4)
    step = Step((chunk("b", (5,), 0, (0,), num_logits=0), chunk("a", (7, 8, 9), 3, (4, 1), slot=2), shown))
    batch = AttentionBatch(pack(step, BLOCK), CPU)
    assert batch.token_ids.tolist() == [5, 7, 8, 9, 5, 6]
    assert batch.positions.tolist() == [0, 3, 4, 5, 0, 1]
    assert batch.slots.tolist() == [0, 4 * BLOCK + 3, 1 * BLOCK, 1 * BLOCK + 1, 0, 1]
    assert batch.logit_rows.tolist() == [3, 4, 5]
    assert batch.inputs.logit_slots.tolist() == [2, -1, 4]
    assert [span.block_ids.tolist() for span in batch.spans] == [[0], [4, 1], [0]]


@settings(max_examples=10, deadline=None)
@given(spans, st.sampled_from([(4, 4), (8, 1)]), st.integers(0, 9))
def test_a_cache_in_bfloat16_is_read_as_it_lies(
    lengths: list[tuple[int, int]], heads: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    batch = make_batch(lengths, seed)
    query = torch.randn(len(batch.token_ids), heads[0], HEAD_SIZE)
    keys, values = torch.randn(2, 128, heads[1], BLOCK, HEAD_SIZE).bfloat16()
    fast = CpuAttention()(query, keys, values, batch)
    expected = PlainAttention()(query, keys.float(), values.float(), batch)
    torch.testing.assert_close(fast, expected, atol=1e-5, rtol=1e-5)


def test_a_long_context_goes_over_several_panels() -> None:
    torch.manual_seed(0)
    batch = make_batch([(150, 1), (90, 80)], 0)
    query = torch.randn(len(batch.token_ids), 14, HEAD_SIZE)
    keys, values = 8 * torch.randn(2, 128, 2, BLOCK, HEAD_SIZE)
    fast = CpuAttention()(query, keys, values, batch)
    torch.testing.assert_close(fast, PlainAttention()(query, keys, values, batch), atol=1e-4, rtol=1e-4)

"""A padded step computes the same sequences, and nothing else."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trtqwen.executor.cuda.batch import TILE_ROWS, context_tiles
from trtqwen.executor.cuda.shapes import GraphShape, graph_shapes, idle, pad
from trtqwen.executor.inputs import Counts, StepInputs, pack
from trtqwen.executor.request import Request
from trtqwen.executor.sequence import Chunk, SequenceState, Step

BLOCK = 16
SHAPES = graph_shapes(80, 512)


@st.composite
def steps(draw: st.DrawFn) -> StepInputs:
    spans = [(draw(st.integers(0, 70)), 1) for _ in range(draw(st.integers(0, 20)))]
    spans += draw(st.lists(st.tuples(st.integers(0, 70), st.integers(2, 200)), max_size=4))
    assume(spans)
    free = iter(range(1, 10_000))
    chunks = []
    for slot, (start, count) in enumerate(spans):
        sequence = SequenceState(Request(id=str(slot), input_token_ids=(1,), max_tokens=1), 1, [1], slot=slot)
        tokens = tuple(draw(st.integers(-1 - slot, 999)) for _ in range(min(count, 3))) + (7,) * (
            count - min(count, 3)
        )
        blocks = array("i", [next(free) for _ in range(-(-(start + count) // BLOCK))])
        samples = count == 1 or draw(st.booleans())
        chunks.append(Chunk(sequence, tokens, start, blocks, samples=samples, num_logits=int(samples)))
    return pack(Step(tuple(chunks)), BLOCK)


def sequences(inputs: StepInputs) -> list[tuple[list[int], ...]]:
    """What the kernels read of each sequence that has tokens."""
    found = []
    for index, (begin, end) in enumerate(pairwise(inputs.query_begins.tolist())):
        blocks = inputs.block_ids[slice(*inputs.block_begins[index : index + 2].tolist())].tolist()
        length = int(inputs.context_lengths[index])
        if length:
            rows = [section[begin:end].tolist() for section in (inputs.token_ids, inputs.positions, inputs.kv_slots)]
            found.append((*rows, [length], blocks))
        else:
            assert not blocks
            assert index < inputs.counts.generation or begin == end
    return found


def shape_of(inputs: StepInputs) -> GraphShape:
    shape = next((shape for shape in SHAPES if shape.fits(inputs.counts)), None)
    assume(shape is not None)
    assert shape is not None
    return shape


@given(steps())
def test_a_padded_step_has_the_same_sequences(inputs: StepInputs) -> None:
    shape = shape_of(inputs)
    padded, counts = pad(inputs, shape), inputs.counts
    assert padded.counts == shape.counts(counts.blocks)
    assert sequences(padded) == sequences(inputs)
    assert sum(padded.kv_slots >= 0) == counts.tokens
    for rows in range(counts.logits):
        row, before = padded.logit_rows[rows], inputs.logit_rows[rows]
        assert (padded.kv_slots[row], padded.token_ids[row]) == (inputs.kv_slots[before], inputs.token_ids[before])
    assert padded.logit_slots.tolist() == [
        *inputs.logit_slots.tolist(),
        *[-1] * (shape.counts(0).logits - counts.logits),
    ]


@given(steps())
def test_its_tiles_are_those_of_the_step_and_empty_ones(inputs: StepInputs) -> None:
    shape = shape_of(inputs)
    padded = pad(inputs, shape)
    own, tiles = context_tiles(inputs), context_tiles(padded, shape.tiles)
    added = shape.generation - inputs.counts.generation
    assert len(tiles) == shape.tiles
    assert [(sequence - added, first) for sequence, first in tiles[: len(own)].tolist()] == [
        tuple(t) for t in own.tolist()
    ]
    for sequence, first in tiles[len(own) :].tolist():
        assert first == 0
        assert padded.query_begins[sequence] == padded.query_begins[sequence + 1]
        assert padded.context_lengths[sequence] == 0


@pytest.mark.parametrize("max_batch_size", [1, 2, 8, 100, 256])
@pytest.mark.parametrize("max_num_tokens", [16, 100, 512, 8192])
def test_small_steps_have_a_shape_and_no_shape_is_too_large(max_batch_size: int, max_num_tokens: int) -> None:
    shapes = graph_shapes(max_batch_size, max_num_tokens)
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        assert shape.generation + bool(shape.prompt_tokens) <= max_batch_size
        assert shape.prompt_tokens <= max_num_tokens
    for generation in range(1, max_batch_size + 1):
        counts = Counts(generation, generation, generation, generation, generation)
        assert any(shape.fits(counts) for shape in shapes)
        if generation < min(max_batch_size, 64) and max_num_tokens >= 512:
            assert any(
                shape.fits(Counts(generation + 512, generation + 1, generation, generation + 1, 9))
                for shape in shapes
            )


@pytest.mark.parametrize(
    "counts",
    [
        Counts(5, 5, 5, 4, 5),  # a prompt of one token whose logits nobody needs
        Counts(60, 5, 0, 5, 9),  # five prompts
        Counts(513, 1, 0, 1, 9),
        Counts(100, 1, 0, 100, 9),  # all logits of a prompt
        Counts(70 + 65, 66, 65, 66, 99),
    ],
)
def test_other_steps_have_none(counts: Counts) -> None:
    assert not any(shape.fits(counts) for shape in SHAPES)


@pytest.mark.parametrize("shape", [GraphShape(4), GraphShape(0, 64), GraphShape(16, 256)])
def test_an_idle_step_touches_no_cache(shape: GraphShape) -> None:
    inputs = idle(shape)
    assert inputs.counts == shape.counts(0)
    assert sequences(inputs) == []
    assert (inputs.kv_slots == -1).all()
    assert len(context_tiles(inputs)) == 0
    assert shape.prompt_tokens // TILE_ROWS < shape.tiles or not shape.prompt_tokens

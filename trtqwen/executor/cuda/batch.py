"""A step on the card: views into one buffer that the tiles of its prompts and `StepInputs` are copied to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trtqwen.executor.inputs import Int32, StepInputs, aligned

TILE_ROWS = 128  # queries of a program of the attention of prompts


@dataclass(frozen=True)
class CudaBatch:
    """A step on the device; the sections of `StepInputs`, int32.

    Attributes:
        generation: sequences with one token, which come first.
        tiles: of the other sequences' attention, see `context_tiles`; None if there are none.
        cached: whether any of those has tokens that came in earlier steps.
        all_rows: whether every row's logits are needed, in order.
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    query_begins: Tensor
    context_lengths: Tensor
    block_begins: Tensor
    block_ids: Tensor
    logit_rows: Tensor
    generation: int
    tiles: Tensor | None
    cached: bool
    all_rows: bool

    @classmethod
    def of(cls, data: Tensor, inputs: StepInputs, tiles: int) -> CudaBatch:
        """The views.

        Args:
            data: int32 on the device: the data of `with_tiles`, with this many tiles. A step without blocks
                is recorded as a CUDA graph, for prompts with and without earlier tokens; its blocks follow later.
        """
        counts = inputs.counts
        first = aligned(2 * tiles)
        views = {name: data[first + place.start : first + place.stop] for name, place in counts.sections.items()}
        recorded = counts.blocks == 0
        earlier = (np.diff(inputs.query_begins) < inputs.context_lengths)[counts.generation :].any()
        return cls(
            token_ids=views["token_ids"],
            positions=views["positions"],
            kv_slots=views["kv_slots"],
            query_begins=views["query_begins"],
            context_lengths=views["context_lengths"],
            block_begins=views["block_begins"],
            block_ids=data[first + counts.sections["block_ids"].start :] if recorded else views["block_ids"],
            logit_rows=views["logit_rows"],
            generation=counts.generation,
            tiles=data[: 2 * tiles].view(-1, 2) if tiles else None,
            cached=recorded or bool(earlier),
            all_rows=counts.logits == counts.tokens,
        )


def with_tiles(inputs: StepInputs, tiles: Int32) -> Int32:
    """The data of a step, with its tiles before it."""
    before = np.zeros(aligned(tiles.size), np.int32)
    before[: tiles.size] = tiles.reshape(-1)
    return np.concatenate([before, inputs.data])


def context_tiles(inputs: StepInputs, count: int = 0) -> Int32:
    """(sequence, its first query) of every program, [tiles, 2].

    Programs that read most of the cache come first.

    Args:
        count: of tiles at least. Added ones belong to the last sequence, which must be empty.
    """
    begins = inputs.query_begins
    tiles: list[tuple[int, int, int]] = []
    for sequence in range(inputs.counts.generation, inputs.counts.sequences):
        queries = int(begins[sequence + 1] - begins[sequence])
        before = int(inputs.context_lengths[sequence]) - queries
        tiles += [(-(before + first), sequence, first) for first in range(0, queries, TILE_ROWS)]
    tiles.sort()
    places = [tile[1:] for tile in tiles]
    places += [(inputs.counts.sequences - 1, 0)] * (count - len(places))
    return np.array(places, np.int32).reshape(-1, 2)

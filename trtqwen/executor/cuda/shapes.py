"""The shapes of steps that become CUDA graphs, and steps padded to them.

Python launches the kernels of a step of a 7B model in 9 to 14 ms, longer than an H200 computes a few hundred tokens.
So not only steps that generate are recorded, but small ones with prompts, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtqwen.executor.cuda.batch import TILE_ROWS
from trtqwen.executor.inputs import Counts, StepInputs

_PROMPTS = 4  # of a step, at most
_PROMPT_TOKENS = (32, 64, 128, 192, 256, 384, 512)
_NEXT_TO_PROMPTS = (0, 16, 64)  # sequences that generate
_TOKEN_SECTIONS = ("token_ids", "positions", "kv_slots")


@dataclass(frozen=True)
class GraphShape:
    """Room for a step.

    Attributes:
        generation: sequences with one token.
        prompt_tokens: tokens of up to four other sequences; 0 for none.
    """

    generation: int
    prompt_tokens: int = 0

    @property
    def tiles(self) -> int:
        """Programs of the attention of prompts, at most; see `context_tiles`."""
        return self.prompt_tokens // TILE_ROWS + self._prompts

    def counts(self, blocks: int) -> Counts:
        """Sizes of a padded step. An empty sequence comes last if there are prompts: unused tiles belong to it."""
        return Counts(
            tokens=self.generation + self.prompt_tokens,
            sequences=self.generation + self._prompts + bool(self._prompts),
            generation=self.generation,
            logits=self.generation + self._prompts,
            blocks=blocks,
        )

    def fits(self, counts: Counts) -> bool:
        """Return whether a step has room here."""
        prompts = counts.sequences - counts.generation
        if bool(prompts) != bool(self._prompts) or counts.generation > self.generation:
            return False
        if not prompts:
            return counts.logits == counts.tokens
        return (
            prompts <= self._prompts
            and counts.tokens - counts.generation <= self.prompt_tokens
            and counts.logits <= self.generation + self._prompts
        )

    @property
    def _prompts(self) -> int:
        return _PROMPTS if self.prompt_tokens else 0


def graph_shapes(max_batch_size: int, max_num_tokens: int) -> list[GraphShape]:
    """Return the shapes to record, by tokens: few for a fast start, and close to each other for little padding."""
    sizes = {1, 2, 4, max_batch_size, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32)}
    next_to = {min(size, max_batch_size - 1) for size in _NEXT_TO_PROMPTS}  # one at least is a prompt
    shapes = [GraphShape(size) for size in sizes if size <= max_batch_size]
    shapes += [GraphShape(size, tokens) for size in next_to for tokens in _PROMPT_TOKENS if tokens <= max_num_tokens]
    return sorted(shapes, key=lambda shape: shape.counts(0).tokens)


def pad(inputs: StepInputs, shape: GraphShape) -> StepInputs:
    """Fill a step up to a shape that it fits: what is added reads and writes no cache, and its logits come last."""
    counts, padded = inputs.counts, shape.counts(inputs.counts.blocks)
    result = StepInputs(padded, np.zeros(padded.total, np.int32))
    own, room = counts.generation, shape.generation
    prompts, tokens = counts.sequences - own, counts.tokens - own
    result.kv_slots[:] = -1
    for name in _TOKEN_SECTIONS:
        source, target = getattr(inputs, name), getattr(result, name)
        target[:own], target[room : room + tokens] = source[:own], source[own:]
    lengths = inputs.context_lengths
    result.context_lengths[:own], result.context_lengths[room : room + prompts] = lengths[:own], lengths[own:]
    result.query_begins[:room] = np.arange(room)
    result.query_begins[room : room + prompts + 1] = inputs.query_begins[own:] + (room - own)
    result.query_begins[room + prompts + 1 :] = room + tokens
    begins = inputs.block_begins
    result.block_begins[:own], result.block_begins[own:room] = begins[:own], begins[own]
    result.block_begins[room : room + prompts + 1] = begins[own:]
    result.block_begins[room + prompts + 1 :] = counts.blocks
    rows = inputs.logit_rows
    result.logit_rows[: len(rows)] = np.where(rows < own, rows, rows + (room - own))
    result.logit_slots[:] = -1
    result.logit_slots[: len(rows)] = inputs.logit_slots
    result.block_ids[:] = inputs.block_ids
    return result


def idle(shape: GraphShape) -> StepInputs:
    """Return a step of a shape whose sequences neither read nor write the KV cache."""
    nothing = Counts(0, 0, 0, 0, 0)
    return pad(StepInputs(nothing, np.zeros(nothing.total, np.int32)), shape)

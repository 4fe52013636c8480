"""The rank mapping: tensor and pipeline parallelism with TensorRT-LLM's numbering of ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankMapping:
    """`world_size = tp_size * pp_size` ranks; rank r is tensor rank `r % tp_size` of stage `r // tp_size`."""

    tp_size: int = 1
    pp_size: int = 1

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp_size

    def stage_ranks(self, stage: int) -> range:
        """The ranks of one pipeline stage."""
        return range(stage * self.tp_size, (stage + 1) * self.tp_size)

    def stage_layers(self, stage: int, num_layers: int) -> range:
        """Global indices of a stage's decoder layers; the first stages take the remainder, as releases 1.x do."""
        share, rest = divmod(num_layers, self.pp_size)
        start = stage * share + min(stage, rest)
        return range(start, start + share + (stage < rest))

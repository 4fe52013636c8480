"""Shapes of a layer's matrices on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

TILE = 64  # sizes of INT8 weight-only matrices, for each rank


class Sizes(Protocol):
    """The sizes of a model that its matrices follow from: those of a Hugging Face config or of a checkpoint's."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_size(self) -> int: ...


@dataclass(frozen=True)
class RankMatrices:
    """[out, in] of each matrix of one layer on one rank."""

    qkv: tuple[int, int]
    dense: tuple[int, int]
    fc: tuple[int, int]
    proj: tuple[int, int]

    @property
    def all(self) -> tuple[tuple[int, int], ...]:
        """The five of them: `fc` has a twin, `gate`."""
        return self.qkv, self.dense, self.fc, self.fc, self.proj

    @property
    def values(self) -> int:
        """Number of weights in all of them."""
        return sum(out * inner for out, inner in self.all)


def local_kv_heads(sizes: Sizes, tp_size: int) -> int:
    """KV heads of one rank. With more ranks than KV heads, each rank holds a copy of one."""
    return max(1, sizes.num_key_value_heads // tp_size)


def rank_matrices(sizes: Sizes, tp_size: int, *, tiled: bool = False) -> RankMatrices:
    """The matrices of a layer on one rank.

    Args:
        tiled: pad the intermediate size as INT8 weight-only kernels need it.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size // tp_size
    if tiled:
        inner = -(-sizes.intermediate_size // (TILE * tp_size)) * TILE
    query = sizes.num_attention_heads // tp_size * sizes.head_size
    qkv = query + 2 * local_kv_heads(sizes, tp_size) * sizes.head_size
    return RankMatrices((qkv, hidden), (hidden, query), (inner, hidden), (hidden, inner))

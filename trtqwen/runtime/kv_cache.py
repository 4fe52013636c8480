"""The paged KV cache: a pool of blocks handed out by number, and the tensors behind them."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Numbers of free KV cache blocks. Invariant: every block is free, or owned by one sequence."""

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_block)

    def grow(self, owned: list[int], num_tokens: int) -> bool:
        """Extend a sequence's blocks until they hold `num_tokens` tokens, or leave them alone and return False."""
        missing = self.blocks_for(num_tokens) - len(owned)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            owned.append(self._free.pop())
        return True

    def release(self, blocks: Iterable[int]) -> None:
        self._free.extend(blocks)

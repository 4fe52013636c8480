"""The paged KV cache: a pool of numbered blocks."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence
from hashlib import blake2b


class BlockPool:
    """The numbers of KV cache blocks, their holders and their contents.

    Invariant: a block is free exactly if no sequence holds it. Full blocks may be published under a key that stands
    for all tokens up to their end; sequences that begin alike then share them. A published block stays findable
    while it is free, until it is taken for something else: the longest unused first.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first
        self._keys: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_block)

    def grow(self, owned: MutableSequence[int], num_tokens: int) -> bool:
        """Extend a sequence's blocks until they hold `num_tokens` tokens, or leave them alone and return False."""
        missing = self.blocks_for(num_tokens) - len(owned)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            owned.append(self._take())
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Release a sequence's blocks. The end of a text is evicted before its beginning."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._keys:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block findable; of two blocks with the same content the first one counts."""
        if key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest prefix of a sequence's keys."""
        blocks = []
        for key in keys:
            if key not in self._published:
                break
            blocks.append(self._published[key])
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Hold found blocks for one sequence more."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of these blocks some sequence holds."""
        return sum(self._holders[block] > 0 for block in blocks)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._holders[block] = 1
        if block in self._keys:
            del self._published[self._keys.pop(block)]
        return block


def block_key(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of a full block: a digest of all tokens up to its end.

    Python's `hash` is not safe here: a client could find two prompts that collide, and read another client's block.

    Args:
        before: key of the block before; for the first one that of the salt.
        token_ids: the block's own tokens.
    """
    return blake2b(before + array("I", token_ids).tobytes(), digest_size=16).digest()


def salt_key(salt: str) -> bytes:
    """Return the key before the first block's. Requests with different salts share no blocks."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest() if salt else b""

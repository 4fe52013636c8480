"""Beginnings of prompts as hashes: equal beginnings have equal hashes, in every process and on every machine."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import xxhash


def prefixes(token_ids: Sequence[int], tokens_per_block: int, salt: str = "") -> tuple[int, ...]:
    """Hashes of a prompt's beginnings, from the shortest to the longest.

    A KV cache shares whole blocks, so a beginning is a number of blocks. Their numbers grow by about a half each
    time, so that even a long prompt has few of them.

    Args:
        tokens_per_block: of the KV cache.
        salt: equal beginnings with another one are different: they share no blocks.
    """
    content = memoryview(array("q", token_ids)).cast("B")
    digest, done, hashes = xxhash.xxh3_64(salt.encode()), 0, []
    for blocks in _lengths(len(token_ids) // tokens_per_block):
        end = blocks * tokens_per_block * 8
        digest.update(content[done:end])
        done = end
        hashes.append(digest.intdigest())
    return tuple(hashes)


def _lengths(most: int) -> Iterator[int]:
    blocks = 1
    while blocks <= most:
        yield blocks
        blocks += max(1, blocks // 2)

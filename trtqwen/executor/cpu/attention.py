"""Attention that reads KV cache blocks in place.

A work item is a tile of one sequence's query rows and one KV head. The query heads that share the KV head and the
rows of the tile go over each block of keys together, so that a block is read once for all of them. Softmax is
computed online over panels of blocks (Milakov and Gimelshein 2018): an item's memory does not grow with the context.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trtqwen.executor.cpu.exp import exp
from trtqwen.executor.cpu.jit import compiled, widen

_PANEL = 128  # tokens whose scores are held at a time


@compiled()
def _scores(query: Any, key: Any, scores: Any, at: int, count: int, scale: Any) -> None:
    """scores[:, at : at + count] of query vectors [rows, size] against the first `count` keys [block, size]."""
    rows, size = query.shape
    row = 0
    while row + 4 <= rows:
        for j in range(count):
            a = b = c = d = np.float32(0)
            for i in range(size):
                k = widen(key[j, i])
                a += query[row, i] * k
                b += query[row + 1, i] * k
                c += query[row + 2, i] * k
                d += query[row + 3, i] * k
            scores[row, at + j] = a * scale
            scores[row + 1, at + j] = b * scale
            scores[row + 2, at + j] = c * scale
            scores[row + 3, at + j] = d * scale
        row += 4
    while row < rows:
        for j in range(count):
            a = np.float32(0)
            for i in range(size):
                a += query[row, i] * widen(key[j, i])
            scores[row, at + j] = a * scale
        row += 1


@compiled()
def _add_values(weights: Any, value: Any, output: Any, at: int, count: int) -> None:
    """output [rows, size] += weights[:, at : at + count] @ value[:count]."""
    rows, size = output.shape
    for row in range(rows):
        j = 0
        while j + 4 <= count:
            a, b = weights[row, at + j], weights[row, at + j + 1]
            c, d = weights[row, at + j + 2], weights[row, at + j + 3]
            for i in range(size):
                output[row, i] += (
                    a * widen(value[j, i])
                    + b * widen(value[j + 1, i])
                    + c * widen(value[j + 2, i])
                    + d * widen(value[j + 3, i])
                )
            j += 4
        while j < count:
            a = weights[row, at + j]
            for i in range(size):
                output[row, i] += a * widen(value[j, i])
            j += 1


@compiled(parallel=True, nogil=True)
def paged_attention(
    query: Any, keys: Any, values: Any, tiles: Any, table: Any, block_starts: Any, scale: Any, output: Any
) -> None:
    """Causal attention of packed queries against a paged cache.

    Args:
        query, output: float32 [tokens, heads, head_size].
        keys, values: [blocks, kv_heads, tokens_per_block, head_size], float32 or the bits of bfloat16 as uint16.
        tiles: int64 [tiles, 4]: sequence, first row, number of rows, and position of the first row in its sequence.
        table, block_starts: int32; the blocks of sequence s are `table[block_starts[s]:]`.
        scale: float32, multiplies the scores.
    """
    heads, size = query.shape[1], query.shape[2]
    kv_heads, block_size = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    for item in prange(len(tiles) * kv_heads):
        tile, head = item // kv_heads, item % kv_heads
        sequence, begin, rows, position = tiles[tile]
        first = block_starts[sequence]
        vectors = rows * group
        q = np.empty((vectors, size), np.float32)
        for r in range(rows):
            for g in range(group):
                for i in range(size):
                    q[r * group + g, i] = query[begin + r, head * group + g, i]
        out = np.zeros((vectors, size), np.float32)
        top = np.full(vectors, np.float32(-np.inf))
        total = np.zeros(vectors, np.float32)
        panel = max(1, _PANEL // block_size) * block_size
        scores = np.empty((vectors, panel), np.float32)
        context = position + rows  # the last row sees them all
        for start in range(0, context, panel):
            length = min(panel, context - start)
            for at in range(0, length, block_size):
                block = table[first + (start + at) // block_size]
                _scores(q, keys[block, head], scores, at, min(block_size, length - at), scale)
            for v in range(vectors):
                seen = min(length, position + v // group + 1 - start)
                best = top[v]
                for j in range(seen):
                    best = max(best, scores[v, j])
                if seen > 0:
                    shrink = exp(top[v] - best)
                    added = np.float32(0)
                    for j in range(seen):
                        e = exp(scores[v, j] - best)
                        scores[v, j] = e
                        added += e
                    total[v] = total[v] * shrink + added
                    top[v] = best
                    if shrink != np.float32(1):
                        for i in range(size):
                            out[v, i] *= shrink
                for j in range(max(seen, 0), length):
                    scores[v, j] = np.float32(0)
            for at in range(0, length, block_size):
                block = table[first + (start + at) // block_size]
                _add_values(scores, values[block, head], out, at, min(block_size, length - at))
        for r in range(rows):
            for g in range(group):
                v = r * group + g
                inverse = np.float32(1) / total[v]
                for i in range(size):
                    output[begin + r, head * group + g, i] = out[v, i] * inverse


@compiled()
def store(key: Any, value: Any, slots: Any, keys: Any, values: Any) -> None:
    """Store packed keys and values [tokens, kv_heads, head_size] in their slots of a cache of the same dtype."""
    tokens, heads, size = key.shape
    block_size = keys.shape[2]
    for token in range(tokens):
        block, offset = slots[token] // block_size, slots[token] % block_size
        for head in range(heads):
            for i in range(size):
                keys[block, head, offset, i] = key[token, head, i]
                values[block, head, offset, i] = value[token, head, i]

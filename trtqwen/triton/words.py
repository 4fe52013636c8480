"""Word lists as TensorRT-LLM passes them: one [2, N] tensor of flat ids over cumulative end offsets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trtqwen.diagnostics import RequestError

Words = tuple[tuple[int, ...], ...]


def pack_words(rows: Sequence[Words]) -> npt.NDArray[np.int32]:
    """INT32 [rows, 2, N]: row 0 has the words' ids one after another, row 1 their end offsets, padded with -1."""
    width = max((sum(map(len, words)) for words in rows), default=0)
    packed = np.zeros((len(rows), 2, width), np.int32)
    packed[:, 1] = -1
    for row, words in zip(packed, rows, strict=True):
        ids = [token_id for word in words for token_id in word]
        row[0, : len(ids)] = ids
        row[1, : len(words)] = np.cumsum([len(word) for word in words])
    return packed


def unpack_words(name: str, packed: npt.NDArray[np.int32]) -> Words:
    """The words of one row, INT32 [2, N].

    Args:
        name: the tensor's, for the error.

    Raises:
        RequestError: if the offsets do not rise within the row.
    """
    if packed.ndim != 2 or packed.shape[0] != 2:
        raise RequestError(f"{name}: has shape {list(packed.shape)}", "send [2, N]: ids over end offsets")
    ids, offsets = packed.tolist()
    words: list[tuple[int, ...]] = []
    start = 0
    for end in offsets:
        if end < 0:
            break
        if not start < end <= len(ids):
            raise RequestError(f"{name}: end offset {end} is out of order", "send rising offsets padded with -1")
        words.append(tuple(ids[start:end]))
        start = end
    return tuple(words)

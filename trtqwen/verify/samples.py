"""The texts that model and checkpoint are compared on."""

from __future__ import annotations

import sys
from pathlib import Path

from trtqwen.diagnostics import InputError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.texts import read_texts, tokenize

SAMPLE_TOKENS = 1024


def read_samples(model: Path, text: Path, max_tokens: int) -> list[list[int]]:
    """Windows of texts spread evenly over a file, as token ids: about `max_tokens` in all, at least two each.

    Raises:
        InputError: if the file has no such text, or the model has no tokenizer.
    """
    windows = [
        ids[start : start + SAMPLE_TOKENS]
        for ids in tokenize(read_texts(text), Tokenizer(model), sys.maxsize)
        for start in range(0, len(ids), SAMPLE_TOKENS)
    ]
    samples = [ids for ids in windows if len(ids) > 1]
    samples = samples[:: max(1, round(sum(map(len, samples)) / max_tokens))]
    left = max_tokens
    chosen = []
    for ids in samples:
        chosen.append(ids[:left])
        left -= len(chosen[-1])
        if left < 2:
            break
    if not chosen:
        raise InputError(f"{text}: holds no text of two tokens", "name another file")
    return chosen

"""Guided decoding with xgrammar: schemas, regular expressions and grammars as masks over the vocabulary."""

from __future__ import annotations

import importlib.util
import re
import threading
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtqwen.diagnostics import RequestError
from trtqwen.executor.guide_compiler import GuideCompiler, pad_vocabulary
from trtqwen.executor.request import Request
from trtqwen.hf.tokenizer import Tokenizer

_PLACE_IN_SOURCE = re.compile(r"^\[[\d:]+\] \S+?: ")


class GuidedDecoder:
    """Creates the guides of requests. Thread-safe; xgrammar lets other Python threads run while it compiles.

    Args:
        tokenizer: the model's tokenizer directory.
        vocab_size: of the model; rows beyond the tokenizer are never chosen.
    """

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        self._directory = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._compiler: GuideCompiler | None = None
        self._stop_ids: tuple[int, ...] = ()
        self._printable = torch.zeros(0)

    def prepare(self, request: Request) -> tuple[Request, XGrammarGuide]:
        """The guide of a guided request, and the request with an end: without one of its own it gets the
        tokenizer's, because a complete document must be followed by something.

        Raises:
            RequestError: if the guide cannot be compiled, or not within `COMPILE_LIMIT`.
        """
        import xgrammar

        assert request.guided_decoding is not None
        with self._lock:
            compiler = self._compiler = self._compiler or self._make_compiler()
        compiler.check(request.guided_decoding)
        end_id = self._stop_ids[0] if request.end_id is None else request.end_id
        try:
            grammar = compiler.compile(request.guided_decoding)
            matcher = xgrammar.GrammarMatcher(grammar, override_stop_tokens=[end_id])
        except Exception as problem:  # xgrammar raises bare RuntimeErrors
            guide_type, reason = request.guided_decoding.guide_type, _reason(problem)
            raise RequestError(
                f"guided_decoding_guide: is not a usable {guide_type} ({reason})", "correct it"
            ) from None
        # xgrammar 0.2.8 lets raw control characters into strings of bounded length, which JSON forbids.
        one_line = request.guided_decoding.guide_type == "json_schema"
        guide = XGrammarGuide(matcher, self._vocab_size, self._printable if one_line else None)
        return request.model_copy(update={"end_id": end_id}), guide

    def _make_compiler(self) -> GuideCompiler:
        compiler = GuideCompiler(self._directory, self._vocab_size)
        tokenizer = Tokenizer(self._directory)
        self._stop_ids = tokenizer.stop_ids
        vocabulary = pad_vocabulary(tokenizer, self._vocab_size)
        self._printable = torch.tensor([0.0 if all(byte >= 0x20 for byte in token) else -inf for token in vocabulary])
        return compiler


class XGrammarGuide:
    """The state of one answer in its grammar.

    Args:
        bias: added to the logits besides, float32 [vocab_size].
    """

    def __init__(self, matcher: Any, vocab_size: int, bias: Tensor | None) -> None:
        self._matcher = matcher
        self._bias = bias
        self._allowed = torch.zeros((1, -(-vocab_size // 32)), dtype=torch.int32)

    def mask(self, row: Tensor) -> None:
        import xgrammar

        try:
            self._matcher.fill_next_token_bitmask(self._allowed)
        except Exception as problem:  # xgrammar raises bare RuntimeErrors
            raise RequestError(f"guided_decoding_guide: cannot be followed further ({_reason(problem)})") from None
        if row.device.type == "cpu":
            xgrammar.apply_token_bitmask_inplace(row[None], self._allowed)
        else:
            bits = np.unpackbits(self._allowed.numpy().view(np.uint8), bitorder="little")[: len(row)]
            row.masked_fill_(torch.from_numpy(bits == 0).to(row.device), -inf)
        if self._bias is not None:
            row += self._bias.to(row.device)

    def accept(self, token_id: int) -> None:
        self._matcher.accept_token(token_id)


def check_installed() -> None:
    """Raise a RequestError if xgrammar is missing."""
    if importlib.util.find_spec("xgrammar") is None:
        raise RequestError(
            "guided_decoding_guide_type: needs xgrammar, which is not installed on the server",
            "`pip install 'trtqwen[guided]'` there",
        )


def _reason(problem: Exception) -> str:
    lines = _PLACE_IN_SOURCE.sub("", str(problem)).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(problem).__name__

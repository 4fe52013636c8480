"""The answer of one request from another project's engine: its end, and its metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trtqwen.executor.request import FinishReason, PerfMetrics, Request, Response, TopLogProbs


@dataclass(frozen=True)
class Piece:
    """A piece of an answer from an engine.

    Attributes:
        token_ids: new tokens.
        log_probs: one for each of them, if asked for.
        finish: why the answer ended, with its last piece: `length` or another word.
        reused_tokens: prompt tokens that the engine found computed, as far as it tells.
        top_log_probs: in place of each token, the most likely ones with their log probabilities, in falling order.
    """

    token_ids: Sequence[int] = ()
    log_probs: Sequence[float] = ()
    finish: str | None = None
    reused_tokens: int = 0
    top_log_probs: Sequence[Sequence[tuple[int, float]]] = ()


class Answer:
    """Turns an engine's pieces into responses by the executor's rules.

    The end id is not part of the answer, stop words are; both count only after `min_tokens` tokens.

    Args:
        end_id: ends the answer.
        tokens_per_block: of the KV cache.
    """

    def __init__(self, request: Request, end_id: int | None, tokens_per_block: int) -> None:
        self._request = request
        self._end_id = end_id
        self._tokens_per_block = tokens_per_block
        self._token_ids: list[int] = []
        self._arrival = time.monotonic_ns()
        self._first = self._last = 0

    def take(self, piece: Piece) -> Response | None:
        """The response for a piece; None if there is nothing to tell."""
        request, kept = self._request, 0
        reason = None
        for token_id in piece.token_ids:
            may_end = len(self._token_ids) >= request.sampling.min_tokens
            if may_end and token_id == self._end_id:
                reason = FinishReason.END_ID
                break
            self._token_ids.append(token_id)
            kept += 1
            if may_end and any(self._ends_with(word) for word in request.stop_words):
                reason = FinishReason.STOP_WORDS
                break
        if reason is None and piece.finish is not None:
            # A stop word is among the tokens, so it was found above; the end id is not, in some releases.
            stopped = FinishReason.STOP_WORDS if self._end_id is None else FinishReason.END_ID
            reason = FinishReason.LENGTH if piece.finish == "length" else stopped
        self._last = time.monotonic_ns()
        self._first = self._first or self._last
        if not kept and reason is None:
            return None
        told = reason is not None and request.output.return_perf_metrics
        count = request.output.num_top_log_probs
        return Response(
            request_id=request.id,
            token_ids=tuple(piece.token_ids[:kept]),
            log_probs=tuple(piece.log_probs[:kept]) if request.output.return_log_probs else (),
            top_log_probs=_top_log_probs(piece.top_log_probs[:kept], count) if count and kept else None,
            perf_metrics=self._metrics(piece.reused_tokens) if told else None,
            finish_reason=reason,
        )

    def _metrics(self, reused_tokens: int) -> PerfMetrics:
        """Times and blocks. Times are those of this process.

        The engine does not tell when it scheduled the request: that is the arrival.
        """
        tokens = len(self._request.input_token_ids) + len(self._token_ids)
        total = -(-tokens // self._tokens_per_block)
        reused = min(total, reused_tokens // self._tokens_per_block)
        return PerfMetrics(
            arrival_time_ns=self._arrival,
            first_scheduled_time_ns=self._arrival,
            first_token_time_ns=self._first,
            last_token_time_ns=self._last,
            kv_cache_alloc_total_blocks=total,
            kv_cache_alloc_new_blocks=total - reused,
            kv_cache_reused_blocks=reused,
        )

    def _ends_with(self, word: Sequence[int]) -> bool:
        return len(word) <= len(self._token_ids) and self._token_ids[-len(word) :] == list(word)


def _top_log_probs(places: Sequence[Sequence[tuple[int, float]]], count: int) -> TopLogProbs | None:
    """Return the same number of tokens at each position; None if the engine returned none."""
    if not places:
        return None
    rows = [[*place[:count], *[(-1, -math.inf)] * (count - len(place))] for place in places]
    table = np.array(rows)  # [places, count, 2]
    return TopLogProbs(
        ids=table[:, :, 0].astype(np.int32).tobytes(), log_probs=table[:, :, 1].astype(np.float32).tobytes()
    )

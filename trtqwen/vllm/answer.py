"""The answer of one request: where it ends, which vLLM does not decide alone."""

from __future__ import annotations

from collections.abc import Sequence

from trtqwen.executor.request import FinishReason, Request, Response


class Answer:
    """Turns vLLM's pieces into responses by the executor's rules.

    The end id is not part of the answer, stop words are; both count only after `min_tokens` tokens.

    Args:
        end_id: ends the answer.
    """

    def __init__(self, request: Request, end_id: int | None) -> None:
        self._request = request
        self._end_id = end_id
        self._token_ids: list[int] = []

    def take(self, token_ids: Sequence[int], log_probs: Sequence[float], finish: str | None) -> Response | None:
        """The response for new tokens; None if there is nothing to tell.

        Args:
            finish: vLLM's finish reason, with the last piece.
        """
        request, kept = self._request, 0
        reason = None
        for token_id in token_ids:
            may_end = len(self._token_ids) >= request.sampling.min_tokens
            if may_end and token_id == self._end_id:
                reason = FinishReason.END_ID
                break
            self._token_ids.append(token_id)
            kept += 1
            if may_end and any(self._ends_with(word) for word in request.stop_words):
                reason = FinishReason.STOP_WORDS
                break
        if reason is None and finish is not None:
            reason = FinishReason.LENGTH if finish == "length" else FinishReason.STOP_WORDS
        if not kept and reason is None:
            return None
        return Response(
            request_id=request.id,
            token_ids=tuple(token_ids[:kept]),
            log_probs=tuple(log_probs[:kept]) if request.output.return_log_probs else (),
            finish_reason=reason,
        )

    def _ends_with(self, word: Sequence[int]) -> bool:
        return len(word) <= len(self._token_ids) and self._token_ids[-len(word) :] == list(word)

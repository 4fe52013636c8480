"""The state of one sequence's answer: text, stop strings and finish reason."""

from __future__ import annotations

from collections.abc import Sequence

from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.plan import Finish, GenerationPlan, Piece, TokenLogProb
from trtqwen.gateway.generation.upstream import Reply
from trtqwen.gateway.model import ServedModel
from trtqwen.hf.text_stream import StopStrings, TextStream

_NAN_TOKENS = 8  # a float16 engine that overflowed answers with token 0, "!" in Qwen's vocabulary, forever


class Answer:
    """Converts one sequence's tokens to text."""

    def __init__(self, model: ServedModel, plan: GenerationPlan, index: int, stop_ids: frozenset[int]) -> None:
        sampling = plan.sampling
        self._plan = plan
        self._index = index
        own = stop_ids if sampling.end_id is None else frozenset((sampling.end_id,))
        self._own_stop_ids = frozenset() if sampling.ignore_eos else own
        self._stop_ids = self._own_stop_ids | sampling.stop_ids
        self._token_bytes = model.tokenizer.token_bytes
        self._text = TextStream(self._token_bytes)
        self._stops = StopStrings(plan.stop, keep=plan.keep_stop)
        self._zeros = 0
        self._wants_zeros = sampling.bias.get(0, 0) > 0 or 0 in sampling.allowed
        self._decoded = self._sent = 0  # characters
        self._entries: list[TokenLogProb] = []  # not sent yet
        self._prompt: tuple[TokenLogProb, ...] = ()
        self._stop_id: int | None = None
        self.num_tokens = 0
        self.finish: Finish | None = None

    @property
    def only_zeros(self) -> bool:
        return self._zeros >= _NAN_TOKENS and not self._wants_zeros

    def take(self, reply: Reply) -> Piece | None:
        """Take new tokens; return the text that is certain, if any.

        Raises:
            ApiError: if the engine sends nothing but token 0.
        """
        ids = reply.token_ids
        if ids and ids[-1]:
            self._zeros = 0
        else:
            self._guard(ids)
        if reply.prompt:
            self._prompt = self._prompt_entries(reply)
        kept = self._before_stop(ids)
        # What came behind a stop in the same message is no part of the answer: how much does is chance.
        count = len(ids) if self.finish is None else len(kept) + 1
        text, taken, step = "", 0, 1 if self._plan.stop else max(1, len(kept))
        while taken < len(kept) and self._stops.found is None:
            text += self._stops.push(self._decode(kept[taken : taken + step], taken, reply))
            taken += step
        if self._stops.found is not None:
            self.finish, count = "stop", taken
        elif self.finish is not None:
            text += self._stops.push(self._text.flush()) + self._stops.flush()
        self.num_tokens += count
        return self._piece(text)

    def end(self) -> Piece:
        """Return the last piece, after the engine's last token."""
        text = self._stops.push(self._text.flush())
        self.finish = "length" if self.num_tokens >= self._plan.max_tokens else "stop"
        if self._stops.found is None:
            text += self._stops.flush()
        else:
            self.finish = "stop"
        piece = self._piece(text)
        assert piece is not None
        return piece

    def _guard(self, ids: Sequence[int]) -> None:
        if not any(ids):
            self._zeros += len(ids)
        else:
            self._zeros = next(count for count, token_id in enumerate(reversed(ids)) if token_id)
        if self.only_zeros:
            raise ApiError(
                500,
                f"the engine sent token 0 {self._zeros} times in a row, as one does whose float16 overflows; serve "
                "with enable_context_fmha_fp32_acc or in bfloat16",
                "nan_guard",
            )

    def _before_stop(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self._stop_ids.isdisjoint(ids):
            return ids
        for count, token_id in enumerate(ids):
            if token_id in self._stop_ids and self.num_tokens + count >= self._plan.sampling.min_tokens:
                self.finish = "stop"
                self._stop_id = None if token_id in self._own_stop_ids else token_id
                return ids[:count]
        return ids

    def _decode(self, ids: Sequence[int], begin: int, reply: Reply) -> str:
        """Return the text of ids, which are those of a reply from `begin` on, and keep their log probabilities."""
        if not self._plan.sampling.log_probs:
            return self._text.push(ids)
        text = ""
        count = self._plan.sampling.top_log_probs
        for place, (token_id, log_prob) in enumerate(zip(ids, reply.log_probs[begin:], strict=False), begin):
            top = reply.top[place][:count] if reply.top else ()
            self._entries.append(TokenLogProb(token_id, self._bytes(token_id), log_prob, self._decoded, top))
            new = self._text.push((token_id,))
            self._decoded += len(new)
            text += new
        return text

    def _prompt_entries(self, reply: Reply) -> tuple[TokenLogProb, ...]:
        stream, decoded, entries = TextStream(self._token_bytes), 0, []
        count = self._plan.sampling.prompt_log_probs or 0
        for token_id, (log_prob, top) in zip(self._plan.prompts[self._index], reply.prompt, strict=True):
            entries.append(TokenLogProb(token_id, self._bytes(token_id), log_prob, decoded, top[:count]))
            decoded += len(stream.push((token_id,)))
        return tuple(entries)

    def _bytes(self, token_id: int) -> bytes:
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def _piece(self, text: str) -> Piece | None:
        if not self._plan.sampling.log_probs and self.finish is None and not self._prompt:
            return Piece(self._index, text) if text else None
        self._sent += len(text)
        # An answer's tokens end with its text; those of a stop string belong to neither.
        all_sent = self.finish is not None and self._stops.found is None
        ready = [entry for entry in self._entries if all_sent or entry.start < self._sent]
        del self._entries[: len(ready)]
        if text or ready or self.finish is not None or self._prompt:
            prompt, self._prompt = self._prompt, ()
            return Piece(self._index, text, tuple(ready), self.finish, self._stops.found or self._stop_id, prompt)
        return None

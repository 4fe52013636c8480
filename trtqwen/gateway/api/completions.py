"""`/v1/completions`: prompts without a chat template."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from trtqwen.gateway.api.chat import truncated
from trtqwen.gateway.api.envelope import OpenAiAnswers, choice_count, stop_reason
from trtqwen.gateway.api.fields import refuse_unsupported
from trtqwen.gateway.api.log_probs import completion_log_probs, prompt_log_probs
from trtqwen.gateway.api.response_format import plan_guide
from trtqwen.gateway.api.sampling import check_ids, plan_sampling
from trtqwen.gateway.api.schemas import CompletionRequest
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.generation.plan import Finish, GenerationPlan, Piece, TokenLogProb, fit_answer
from trtqwen.gateway.model import ServedModel


@dataclass(frozen=True)
class CompletionPlan:
    """The plan of a completion request.

    Attributes:
        echoes: prompts in front of the answers, one for each answer, with their log probabilities if requested.
        log_probs: number of most likely tokens for each token; None returns no log probabilities.
        no_answer: the request asks only for the prompts' log probabilities.
    """

    generation: GenerationPlan
    echoes: tuple[str, ...]
    echo: bool = False
    log_probs: int | None = None
    no_answer: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


def plan_completion(
    model: ServedModel, config: GatewayConfig, request: CompletionRequest, *, request_id: str = ""
) -> CompletionPlan:
    """Tokenize and check a completion request.

    Args:
        request_id: of the answer; empty draws one.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    refuse_unsupported(request)
    texts, prompts = _prompts(model, request)
    choices = choice_count(request.n, len(prompts), config.max_choices)
    no_answer = request.max_tokens == 0
    if no_answer and not request.echo:
        raise bad_request(
            "max_tokens is 0, and without echo there is nothing to answer; ask for more", param="max_tokens"
        )
    room = fit_answer(model, config, max(map(len, prompts)), 1 if no_answer else request.max_tokens)
    of_prompt = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        of_prompt = max(request.logprobs, of_prompt or 0)
    generation = GenerationPlan(
        request_id=request_id or f"cmpl-{uuid.uuid4().hex}",
        prompts=tuple(prompt for prompt in prompts for _ in range(choices)),
        choices=choices,
        max_tokens=room.max_tokens,
        reserved=room.reserved,
        sampling=plan_sampling(
            model,
            request,
            log_probs=request.logprobs is not None,
            top_log_probs=request.logprobs or 0,
            prompt_log_probs=of_prompt,
            guide=plan_guide(model, request),
        ),
        stop=request.stop_strings,
        keep_stop=bool(request.include_stop_str_in_output),
        priority=request.priority or 0,
    )
    return CompletionPlan(
        generation,
        tuple(text if request.echo else "" for text in texts for _ in range(choices)),
        bool(request.echo),
        request.logprobs,
        no_answer,
        request.include_usage,
        request.continuous_usage,
    )


def _prompts(model: ServedModel, request: CompletionRequest) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return the prompts as sent, and as token ids."""
    texts, prompts = [], []
    for prompt in _listed(request.prompt):
        ids = (
            model.encode(prompt, "prompt", raw=request.add_special_tokens is not False)
            if isinstance(prompt, str)
            else tuple(prompt)
        )
        if not ids:
            raise bad_request("the prompt is empty; send at least one token", param="prompt")
        check_ids(model, ids, "prompt")
        if request.truncate_prompt_tokens is not None:
            ids = truncated(model, ids, request.truncate_prompt_tokens)
        as_sent = isinstance(prompt, str) and request.truncate_prompt_tokens is None
        needed = request.echo and not as_sent
        texts.append(str(prompt) if as_sent else model.tokenizer.decode(ids) if needed else "")
        prompts.append(ids)
    if not prompts:
        raise bad_request("there is no prompt; send one", param="prompt")
    return texts, prompts


def _listed(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """One prompt or several, each a text or token ids, as several."""
    if isinstance(given, str):
        return [given]
    ids = [token_id for token_id in given if isinstance(token_id, int)]
    return [ids] if ids else [prompt for prompt in given if not isinstance(prompt, int)]


class CompletionAnswers(OpenAiAnswers[CompletionPlan]):
    """The answers of one request, streamed or whole."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    async def whole(self) -> dict[str, Any]:
        """The `text_completion` object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        plan = self._plan
        texts = [[echo] for echo in plan.echoes]
        entries: list[list[TokenLogProb]] = [[] for _ in texts]
        prompts: list[Sequence[TokenLogProb]] = [() for _ in texts]
        ends: list[Piece | None] = [None] * len(texts)
        async with aclosing(self._generator.run(plan.generation, self.usage)) as pieces:
            async for piece in pieces:
                prompts[piece.number] = piece.prompt or prompts[piece.number]
                ends[piece.number] = piece
                if not plan.no_answer:
                    texts[piece.number].append(piece.text)
                    entries[piece.number] += piece.log_probs
        choices = []
        for index, end in enumerate(ends):
            finish: Finish | None = "length" if plan.no_answer or end is None else end.finish
            choice: dict[str, Any] = {
                "index": index,
                "text": "".join(texts[index]),
                "logprobs": self._log_probs(index, entries[index], prompts[index]),
                "finish_reason": finish,
            }
            if end is not None and end.matched is not None:
                choice["stop_reason"] = end.matched
            if plan.generation.sampling.prompt_log_probs is not None:
                choice["prompt_logprobs"] = prompt_log_probs(prompts[index], self._token_bytes)
            choices.append(choice)
            self._generator.metrics.finished.labels(finish).inc()
        if plan.no_answer:
            self.usage.output_tokens = 0
        return self._envelope.whole(choices)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events with parts of the `text_completion`.

        Raises:
            ApiError: if the request is refused or fails.
        """
        frame, begun = self._envelope.frame, set()
        async with aclosing(self._generator.run(self._plan.generation, self.usage)) as pieces:
            async for piece in pieces:
                text, first = piece.text, piece.number not in begun
                own: Sequence[TokenLogProb] = piece.log_probs
                if self._plan.no_answer:
                    text, own = "", ()
                if first:
                    begun.add(piece.number)
                    text = self._plan.echoes[piece.number] + text
                log_probs = "null"
                if own or (first and piece.prompt):
                    log_probs = json.dumps(self._log_probs(piece.number, own, piece.prompt))
                if piece.finish is not None:
                    self._generator.metrics.finished.labels(piece.finish).inc()
                body = f'"text":{quoted(text)},"logprobs":{log_probs}{stop_reason(piece.matched)}'
                finish = "length" if piece.finish and self._plan.no_answer else piece.finish
                yield frame(piece.number, body, finish, first=first)
        for last in self._last_frames():
            yield last

    def _log_probs(
        self, index: int, entries: Sequence[TokenLogProb], prompt: Sequence[TokenLogProb]
    ) -> dict[str, Any] | None:
        if self._plan.log_probs is None:
            return None
        count = self._plan.log_probs
        own = completion_log_probs(entries, self._token_bytes, len(self._plan.echoes[index]), count)
        if not self._plan.echo or not prompt:
            return own
        echoed = completion_log_probs(prompt, self._token_bytes, 0, count)
        return {key: None if own[key] is None else echoed[key] + own[key] for key in own}

"""`/v1/completions`: prompts as they are, without a chat template."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from trtqwen.gateway.api.envelope import Envelope, choice_count
from trtqwen.gateway.api.schemas import CompletionRequest, refuse_unsupported
from trtqwen.gateway.api.sse import DONE
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import bad_request, unsupported
from trtqwen.gateway.generation.generator import (
    Finish,
    GenerationPlan,
    Generator,
    TokenLogProb,
    Usage,
    fit_max_tokens,
)
from trtqwen.gateway.generation.inputs import Sampling, draw_seed, plan_bias, plan_sampling
from trtqwen.gateway.model import ServedModel


@dataclass(frozen=True)
class CompletionPlan:
    """A completion request, worked out; `echoes` stand in front of the answers, one for each."""

    generation: GenerationPlan
    echoes: tuple[str, ...]
    include_usage: bool = False


def plan_completion(model: ServedModel, config: GatewayConfig, request: CompletionRequest) -> CompletionPlan:
    """Tokenise and check a completion request.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    refuse_unsupported(request)
    if request.logprobs:
        raise unsupported("logprobs", "the engine tells the chosen token's probability alone; set logprobs to 0")
    if request.echo and request.logprobs is not None:
        raise unsupported("echo", "probabilities of the prompt are not served; leave out echo or logprobs")
    prompts = _prompts(model, request)
    choices = choice_count(request.n, len(prompts), config.max_choices)
    longest = max(map(len, prompts))
    sampling = Sampling(
        plan_sampling(request, model.defaults),
        draw_seed() if request.seed is None else request.seed,
        plan_bias(request, model.vocab_size),
        log_probs=request.logprobs is not None,
        ignore_eos=bool(request.ignore_eos),
    )
    generation = GenerationPlan(
        request_id=f"cmpl-{uuid.uuid4().hex}",
        prompts=tuple(prompt for prompt in prompts for _ in range(choices)),
        choices=choices,
        max_tokens=fit_max_tokens(model, config, longest, request.max_tokens),
        sampling=sampling,
        stop=request.stop_strings,
    )
    echoes = tuple(model.tokenizer.decode(prompt) if request.echo else "" for prompt in generation.prompts)
    return CompletionPlan(generation, echoes, request.include_usage)


def _prompts(model: ServedModel, request: CompletionRequest) -> list[tuple[int, ...]]:
    prompts = []
    for prompt in _listed(request.prompt):
        ids = model.encode(prompt, "prompt", raw=True) if isinstance(prompt, str) else tuple(prompt)
        if not ids:
            raise bad_request("the prompt is empty; send at least one token", param="prompt")
        if max(ids) >= model.vocab_size:
            message = f"token id {max(ids)} is outside the vocabulary of {model.vocab_size}"
            raise bad_request(f"{message}; use the model's own tokenizer", param="prompt")
        prompts.append(ids)
    if not prompts:
        raise bad_request("there is no prompt; send one", param="prompt")
    return prompts


def _listed(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """One prompt or several, each a text or token ids, as several."""
    if isinstance(given, str):
        return [given]
    ids = [token_id for token_id in given if isinstance(token_id, int)]
    return [ids] if ids else [prompt for prompt in given if not isinstance(prompt, int)]


class CompletionAnswers:
    """The answers of one request, streamed or whole."""

    def __init__(self, plan: CompletionPlan, generator: Generator) -> None:
        self._plan = plan
        self._generator = generator
        self._usage = Usage()
        self._envelope = Envelope(
            generator.model, plan.generation, "text_completion", "text_completion", plan.include_usage
        )

    async def whole(self) -> dict[str, Any]:
        """The `text_completion` object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        texts = [[echo] for echo in self._plan.echoes]
        entries: list[list[TokenLogProb]] = [[] for _ in texts]
        reasons: list[Finish | None] = [None] * len(texts)
        async with aclosing(self._generator.run(self._plan.generation, self._usage)) as pieces:
            async for piece in pieces:
                texts[piece.index].append(piece.text)
                entries[piece.index] += piece.log_probs
                reasons[piece.index] = piece.finish
        asked = self._plan.generation.sampling.log_probs
        choices = [
            {
                "index": index,
                "text": "".join(texts[index]),
                "logprobs": _log_probs(entries[index]) if asked else None,
                "finish_reason": reasons[index],
            }
            for index in range(len(texts))
        ]
        for reason in reasons:
            self._generator.metrics.finished.labels(reason).inc()
        return self._envelope.whole(choices, self._usage)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events with parts of the `text_completion`.

        Raises:
            ApiError: if the request is refused or fails.
        """
        frame, begun = self._envelope.frame, set()
        async with aclosing(self._generator.run(self._plan.generation, self._usage)) as pieces:
            async for piece in pieces:
                text, first = piece.text, piece.index not in begun
                if first:
                    begun.add(piece.index)
                    text = self._plan.echoes[piece.index] + text
                log_probs = "null"
                if piece.log_probs:
                    log_probs = json.dumps(_log_probs(piece.log_probs))
                if piece.finish is not None:
                    self._generator.metrics.finished.labels(piece.finish).inc()
                yield frame(piece.index, f'"text":{quoted(text)},"logprobs":{log_probs}', piece.finish, first=first)
        if self._plan.include_usage:
            yield self._envelope.usage_frame(self._usage)
        yield DONE


def _log_probs(entries: Sequence[TokenLogProb]) -> dict[str, Any]:
    return {
        "tokens": [entry.text.decode(errors="replace") for entry in entries],
        "token_logprobs": [entry.log_prob for entry in entries],
        "top_logprobs": None,
        "text_offset": [entry.start for entry in entries],
    }

"""`/generate` and `/generate_stream`: plain text in and out, by the names of Triton's ensemble.

As with Triton, an answer is greedy unless the request has sampling parameters, no chat template is applied, and
streams have no end marker.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from trtqwen.gateway.api.fields import refuse_unsupported
from trtqwen.gateway.api.sampling import bad_words, draw_seed, sampling_values
from trtqwen.gateway.api.schemas import GenerateRequest
from trtqwen.gateway.api.sse import frame
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.inputs import Sampling
from trtqwen.gateway.generation.plan import GenerationPlan, Usage, fit_answer
from trtqwen.gateway.model import ServedModel
from trtqwen.hf.generation import GenerationDefaults

_GREEDY = GenerationDefaults(do_sample=False)
_SAMPLED = GenerationDefaults()


@dataclass(frozen=True)
class PlainPlan:
    """The plan of a plain request; the answer returns `client_id`."""

    generation: GenerationPlan
    client_id: str
    echo: str


def plan_plain(
    model: ServedModel, config: GatewayConfig, request: GenerateRequest, *, request_id: str = ""
) -> PlainPlan:
    """Tokenize and check a plain request.

    Args:
        request_id: of the answer; empty draws one.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    refuse_unsupported(request)
    prompt = model.encode(request.text_input, "text_input", raw=True)
    if not prompt:
        raise bad_request("text_input has no tokens; send some text", param="text_input")
    samples = (request.temperature, request.top_k, request.top_p) != (None, None, None)
    seed = request.random_seed if request.seed is None else request.seed
    values = sampling_values(request, _SAMPLED if samples else _GREEDY)
    if request.min_length and not request.min_tokens:
        values["min_tokens"] = request.min_length
    room = fit_answer(model, config, len(prompt), request.max_tokens)
    generation = GenerationPlan(
        request_id=request_id or f"gen-{uuid.uuid4().hex}",
        prompts=(prompt,),
        choices=1,
        max_tokens=room.max_tokens,
        reserved=room.reserved,
        sampling=Sampling(
            values,
            draw_seed() if seed is None else seed,
            bad_words=bad_words(model, _listed(request.bad_words)),
            log_probs=bool(request.return_log_probs),
            end_id=request.end_id,
        ),
        stop=_listed(request.stop_words),
    )
    return PlainPlan(generation, request.id, request.text_input if request.exclude_input_in_output is False else "")


def _listed(words: str | list[str] | None) -> tuple[str, ...]:
    return tuple(filter(None, (words,) if isinstance(words, str) else words or ()))


class PlainAnswer:
    """The answer of one plain request, streamed or whole."""

    def __init__(self, plan: PlainPlan, generator: AnswerGenerator) -> None:
        self._plan = plan
        self._generator = generator
        self._fields = {"id": plan.client_id, "model_name": generator.model.name, "model_version": "1"}
        self.usage = Usage()

    async def whole(self) -> dict[str, Any]:
        """The answer as one JSON object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        texts: list[str] = []
        log_probs: list[float | None] = []
        async for text, values in self._parts():
            texts.append(text)
            log_probs += values
        return {**self._fields, "text_output": self._plan.echo + "".join(texts), **self._log_probs(log_probs)}

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events with the parts of the answer; the prompt is never among them.

        Raises:
            ApiError: if the request is refused or fails.
        """
        async with aclosing(self._parts()) as parts:
            async for text, values in parts:
                yield frame(json.dumps({**self._fields, "text_output": text, **self._log_probs(values)}))

    def _log_probs(self, values: list[float | None]) -> dict[str, Any]:
        return {"output_log_probs": values} if self._plan.generation.sampling.log_probs else {}

    async def _parts(self) -> AsyncGenerator[tuple[str, list[float | None]], None]:
        async with aclosing(self._generator.run(self._plan.generation, self.usage)) as pieces:
            async for piece in pieces:
                if piece.finish is not None:
                    self._generator.metrics.finished.labels(piece.finish).inc()
                yield piece.text, [entry.log_prob for entry in piece.log_probs]

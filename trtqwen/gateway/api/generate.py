"""`/generate` and `/generate_stream`: plain text in and out, by the names of Triton's ensemble.

As at Triton, an answer is greedy unless the request says how to sample, no chat template is applied, and streams have
no end marker.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from trtqwen.gateway.api.schemas import GenerateRequest
from trtqwen.gateway.api.sse import frame
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import bad_request
from trtqwen.gateway.generation.generator import GenerationPlan, Generator, Usage, fit_max_tokens
from trtqwen.gateway.generation.inputs import Sampling, draw_seed, plan_sampling
from trtqwen.gateway.model import ServedModel
from trtqwen.hf.generation import GenerationDefaults

_GREEDY = GenerationDefaults(do_sample=False)
_SAMPLED = GenerationDefaults()


@dataclass(frozen=True)
class PlainPlan:
    """A plain request, worked out; `client_id` comes back with the answer."""

    generation: GenerationPlan
    client_id: str
    echo: str


def plan_plain(model: ServedModel, config: GatewayConfig, request: GenerateRequest) -> PlainPlan:
    """Tokenise and check a plain request.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    prompt = model.encode(request.text_input, "text_input", raw=True)
    if not prompt:
        raise bad_request("text_input has no tokens; send some text", param="text_input")
    samples = (request.temperature, request.top_k, request.top_p) != (None, None, None)
    stop = request.stop_words or ()
    generation = GenerationPlan(
        request_id=f"gen-{uuid.uuid4().hex}",
        prompts=(prompt,),
        choices=1,
        max_tokens=fit_max_tokens(model, config, len(prompt), request.max_tokens),
        sampling=Sampling(
            plan_sampling(request, _SAMPLED if samples else _GREEDY),
            draw_seed() if request.seed is None else request.seed,
        ),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    return PlainPlan(generation, request.id, request.text_input if request.exclude_input_in_output is False else "")


class PlainAnswer:
    """The answer of one plain request, streamed or whole."""

    def __init__(self, plan: PlainPlan, generator: Generator) -> None:
        self._plan = plan
        self._generator = generator
        self._fields = {"id": plan.client_id, "model_name": generator.model.name, "model_version": "1"}

    async def whole(self) -> dict[str, Any]:
        """The answer as one JSON object.

        Raises:
            ApiError: if the request is refused or fails.
        """
        texts = [text async for text in self._texts()]
        return {**self._fields, "text_output": self._plan.echo + "".join(texts)}

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Events with the parts of the answer; the prompt is never among them.

        Raises:
            ApiError: if the request is refused or fails.
        """
        async with aclosing(self._texts()) as texts:
            async for text in texts:
                yield frame(json.dumps({**self._fields, "text_output": text}))

    async def _texts(self) -> AsyncGenerator[str, None]:
        async with aclosing(self._generator.run(self._plan.generation, Usage())) as pieces:
            async for piece in pieces:
                if piece.finish is not None:
                    self._generator.metrics.finished.labels(piece.finish).inc()
                yield piece.text

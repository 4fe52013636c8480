"""What an answer counts, and how long it takes: the gate's advice rests on that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from trtqwen.gateway.admission.admission import Admission, Capacity, QueueLimits
from trtqwen.gateway.admission.gate import Gate
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.inputs import Sampling
from trtqwen.gateway.generation.plan import GenerationPlan, Usage
from trtqwen.gateway.generation.upstream import Replica, Reply
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import load_model


class Quick(Replica):
    """Says two tokens at once, or fails instead of the second."""

    def __init__(self, second: int | None) -> None:
        super().__init__("127.0.0.1:9")
        self._second = second

    async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[Reply, None]:
        yield Reply((40,))
        if self._second is None:
            raise ApiError(500, "failed", "engine_error")
        yield Reply((self._second,))


class Scripted(Replica):
    """Says tokens in given messages, and then goes on."""

    def __init__(self, messages: list[tuple[int, ...]]) -> None:
        super().__init__("127.0.0.1:9")
        self._messages = messages

    async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[Reply, None]:
        for ids in [*self._messages, *[(43,)] * 5]:
            yield Reply(ids, log_probs=(-1.0,) * len(ids))


@pytest.mark.parametrize(
    ("says", "leaves", "advice"),
    [("limit", False, 19), ("limit", True, 19), ("end", False, 19), ("end", True, 19), ("failure", False, 20)],
)
def test_an_answer_that_ended_shortens_the_advice(
    engine_repository: Path, says: str, leaves: bool, advice: int
) -> None:
    """A turn counts for 1 s at first; one that took no time takes a tenth off each of the twenty to wait for."""
    model = load_model(engine_repository)
    second = {"limit": 41, "end": model.tokenizer.end_id, "failure": None}[says]

    async def test() -> None:
        metrics = Metrics()
        gate = Gate(Admission(1, Capacity(1, 1000), QueueLimits(19, 1000)), metrics, 1)
        generator = AnswerGenerator(model, [Quick(second)], gate, metrics, 10, lambda replica: None)
        plan = GenerationPlan("id", ((1,),), 1, 2, Sampling({}, seed=1), reserved=2)
        try:
            async with aclosing(generator.run(plan, Usage())) as pieces:
                async for piece in pieces:
                    if leaves and piece.finish is not None:
                        break
        except ApiError:
            assert says == "failure"
        with gate.places([1] * 20), pytest.raises(ApiError) as caught, gate.places([1]):
            pass
        assert caught.value.headers == {"Retry-After": str(advice)}

    asyncio.run(test())


MESSAGES: tuple[list[tuple[int, ...]], ...] = (
    [(40,), (41,), (42,)],
    [(40, 41, 42, 43, 44)],
    [(40,), (41, 42, 43)],
    [(40, 41), (42, 43)],
)


@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("stop", ["token", "string", "string of two tokens"])
def test_tokens_behind_a_stop_are_not_counted(engine_repository: Path, stop: str, log_probs: bool) -> None:
    """A busy engine sends several tokens in one message: the count is that of one message a token."""
    model = load_model(engine_repository)
    texts = [model.tokenizer.token_bytes[token].decode() for token in range(40, 45)]
    stops = {"token": (), "string": (texts[2],), "string of two tokens": (texts[1] + texts[2],)}[stop]
    own = frozenset((42,)) if stop == "token" else frozenset()
    sampling = Sampling({}, seed=1, stop_ids=own, log_probs=log_probs)
    plan = GenerationPlan("id", ((1,),), 1, 9, sampling, reserved=2, stop=stops)

    async def run(messages: list[tuple[int, ...]]) -> tuple[str, list[int], int]:
        gate = Gate(Admission(1, Capacity(1, 1000), QueueLimits(19, 1000)), Metrics(), 1)
        generator = AnswerGenerator(model, [Scripted(messages)], gate, Metrics(), 10, lambda replica: None)
        usage = Usage()
        pieces = [piece async for piece in generator.run(plan, usage)]
        assert pieces[-1].finish == "stop"
        told = [entry.token_id for piece in pieces for entry in piece.log_probs]
        return "".join(piece.text for piece in pieces), told, usage.output_tokens

    expected = "".join(texts[: 1 if stop == "string of two tokens" else 2])
    ids = [40] if stop == "string of two tokens" else [40, 41]
    for messages in MESSAGES:
        assert asyncio.run(run(messages)) == (expected, ids if log_probs else [], 3), messages

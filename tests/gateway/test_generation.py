"""How long answers take is told to the gate, whose advice rests on it."""

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
from trtqwen.gateway.generation.answer import Answer
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


def test_tokens_behind_a_stop_token_are_not_counted(engine_repository: Path) -> None:
    """A busy engine sends several tokens in one message: the count is that of one message a token."""
    plan = GenerationPlan("id", ((1,),), 1, 9, Sampling({}, seed=1, stop_ids=frozenset((42,))), reserved=2)
    for messages in ([(40,), (41,), (42,)], [(40, 41, 42, 43, 44)], [(40,), (41, 42, 43)]):
        answer = Answer(load_model(engine_repository), plan, 0, frozenset())
        for ids in messages:
            answer.take(Reply(ids))
        assert (answer.finish, answer.num_tokens) == ("stop", 3)

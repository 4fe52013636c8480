"""Measurement of a model's targets: time and outcome of each request, and a shadow's answers.

A shadow has no effect on clients. It gets a copy only if it has a free turn. Its answers are discarded, and its
failures are only counted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from trtqwen.gateway.admission.auth import CALLER
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.inputs import Sampling
from trtqwen.gateway.generation.plan import GenerationPlan, Piece, Usage
from trtqwen.gateway.metrics import Metrics

Role = Literal["serve", "shadow"]
Texts = tuple[str, ...]
_log = logging.getLogger(__name__)


class _Silent:
    """Metrics that count nothing, because a shadow's tokens are not part of the service."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self


SILENT = cast(Metrics, _Silent())


@dataclass(frozen=True)
class Shadow:
    """An engine that gets copies of requests.

    Attributes:
        name: of the target.
        share: of the requests, 0 to 1.
        generator: of its engine; its metrics are silent and its observation has the role `shadow`.
        most: copies that it works on at a time.
        hold: keeps the engine open.
    """

    name: str
    share: float
    generator: AnswerGenerator
    most: int
    hold: Callable[[], AbstractContextManager[None]]


@dataclass
class Observer:
    """Watches the requests of one target.

    Args:
        model, target, role: labels of the metrics.
        shadows: those of the model; none where this target is one itself.
    """

    metrics: Metrics
    model: str
    target: str
    role: Role = "serve"
    shadows: Sequence[Shadow] = ()

    def __call__(self, plan: GenerationPlan) -> Seen:
        copies = [
            Copy(self.metrics, self.model, shadow, plan) for shadow in self.shadows if random.random() < shadow.share
        ]
        return Seen(self, len(plan.prompts), [copy for copy in copies if copy.begin()])

    def refused(self, code: str) -> None:
        """Count a request that was refused before it ran."""
        self._outcome("refused" if code != "engine_dead" else "failed")

    def _outcome(self, outcome: str) -> None:
        self.metrics.target_requests.labels(self.model, self.target, self.role, outcome).inc()


class Seen:
    """The observation of one request."""

    def __init__(self, observer: Observer, answers: int, copies: Sequence[Copy]) -> None:
        self._observer = observer
        self._copies = copies
        self._texts = [""] * answers if copies else []
        self._left = answers
        self._begun = time.monotonic()
        self._first: float | None = None

    def piece(self, piece: Piece) -> None:
        if self._first is None:
            self._first = time.monotonic()
        if self._texts:
            self._texts[piece.number] += piece.text
        if piece.finish is not None:
            self._left -= 1

    def end(self, usage: Usage, failure: BaseException | None) -> None:
        observer, now = self._observer, time.monotonic()
        metrics, labels = observer.metrics, (observer.model, observer.target, observer.role)
        complete = self._left == 0  # a client that has the whole answer may leave before the generator ends
        if complete:
            outcome = "answered"
        elif isinstance(failure, ApiError):
            outcome = "refused" if failure.status in (400, 429) else "failed"
        elif isinstance(failure, Exception):
            outcome = "failed"
        else:
            outcome = "left"
        observer._outcome(outcome)
        metrics.target_tokens.labels(*labels).inc(usage.output_tokens)
        if self._first is not None:
            metrics.target_first_token_seconds.labels(*labels).observe(self._first - self._begun)
        if complete and self._first is not None:
            metrics.target_seconds.labels(*labels).observe(now - self._begun)
            if usage.output_tokens > 1:
                between = (now - self._first) / (usage.output_tokens - 1)
                metrics.target_token_seconds.labels(*labels).observe(between)
        for copy in self._copies:
            copy.client_has(tuple(self._texts) if complete else None)


_copies: dict[tuple[str, str], set[asyncio.Task[None]]] = defaultdict(set)  # by model and target


def end_copies(model: str, target: str) -> None:
    """End the copies of a target that is no longer a shadow."""
    for task in _copies[model, target]:
        task.cancel()


class Copy:
    """A copy of a request on a shadow."""

    def __init__(self, metrics: Metrics, model: str, shadow: Shadow, plan: GenerationPlan) -> None:
        self._metrics = metrics
        self._labels = (model, shadow.name)
        self._shadow = shadow
        self._plan = replace(plan, request_id=f"shadow-{uuid.uuid4().hex}")
        self._sampling = "greedy" if _greedy(plan.sampling) else "sampled"
        self._client: asyncio.Future[Texts | None] = asyncio.get_running_loop().create_future()

    def begin(self) -> bool:
        """Start it, unless the shadow has no free turn."""
        gate = self._shadow.generator.gate
        if len(_copies[self._labels]) >= self._shadow.most or not gate.has_free_turn(self._plan.reserved_tokens):
            self._result("skipped")
            return False
        context = Context()  # without the client's trace
        context.run(CALLER.set, CALLER.get())
        task: asyncio.Task[None] = context.run(asyncio.create_task, self._run())
        _copies[self._labels].add(task)
        task.add_done_callback(_copies[self._labels].discard)
        return True

    def client_has(self, texts: Texts | None) -> None:
        """Record the client's complete answers; None if they will not be complete."""
        if not self._client.done():
            self._client.set_result(texts)

    async def _run(self) -> None:
        answering = asyncio.create_task(self._answer())
        try:
            with self._shadow.hold():
                await asyncio.wait((answering, self._client), return_when=asyncio.FIRST_COMPLETED)
                if self._client.done() and self._client.result() is None:
                    self._result("unpaired")
                    return
                try:
                    texts = await answering
                except Exception as problem:
                    if not isinstance(problem, ApiError):
                        _log.error("a shadow failed", exc_info=problem)
                    self._result("failed")
                    return
                if (client := await self._client) is None:
                    self._result("unpaired")
                    return
                self._result("same" if texts == client else "different")
                shares = [agreement(one, other) for one, other in zip(client, texts, strict=True)]
                self._metrics.shadow_agreement.labels(*self._labels).observe(min(shares))
        except asyncio.CancelledError:
            self._result("unpaired")
            raise
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _answer(self) -> Texts:
        texts = [""] * len(self._plan.prompts)
        async for piece in self._shadow.generator.run(self._plan, Usage()):
            texts[piece.number] += piece.text
        return tuple(texts)

    def _result(self, result: str) -> None:
        self._metrics.shadow_answers.labels(*self._labels, self._sampling, result).inc()


def agreement(text: str, other: str) -> float:
    """Return the length of the common beginning as a share of the longer text; 1 if both are empty."""
    longest = max(len(text), len(other))
    common = next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    return 1.0 if not longest else (min(len(text), len(other)) if common is None else common) / longest


def _greedy(sampling: Sampling) -> bool:
    return sampling.values.get("runtime_top_k") == 1

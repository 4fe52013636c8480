"""An engine on a virtual clock: the executor's scheduler and block accounting, with a cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trtqwen.executor.request import Request
from trtqwen.executor.scheduler import Scheduler, SchedulerConfig
from trtqwen.executor.sequence import Generated, Step


@dataclass(frozen=True)
class StepWork:
    """The work of a step.

    Attributes:
        tokens: packed tokens of the step.
        generation: sequences of the step in their generation phase.
        pairs: of context tokens with the tokens they attend to.
        rows: tokens whose logits are computed.
        kv_tokens: tokens whose keys and values the generation phase reads.
        past_tokens: tokens before the chunks of the context phase, whose keys and values those read.
    """

    tokens: int
    generation: int
    pairs: float
    rows: int
    kv_tokens: int
    past_tokens: int


def step_work(step: Step) -> StepWork:
    """The work of a step that the scheduler chose."""
    tokens = generation = rows = kv_tokens = past_tokens = 0
    pairs = 0.0
    for chunk in step.chunks:
        count = len(chunk.token_ids)
        tokens += count
        rows += chunk.num_logits
        if count == 1:
            generation += 1
            kv_tokens += chunk.end
        else:
            pairs += count * (chunk.start + (count + 1) / 2)
            past_tokens += chunk.start
    return StepWork(tokens, generation, pairs, rows, kv_tokens, past_tokens)


StepSeconds = Callable[[StepWork], float]


class VirtualEngine:
    """One replica. It keeps the order of `loop.StepLoop`: overlapped, the step after the running one is scheduled
    before the tokens of the running one are known.

    Args:
        seconds: how long a step takes.
        overlap: schedule a step while the one before runs.

    Attributes:
        ends: when the running step ends, on the virtual clock; None while nothing runs.
        work: of all steps so far.
    """

    def __init__(self, limits: SchedulerConfig, seconds: StepSeconds, *, overlap: bool) -> None:
        self.scheduler = Scheduler(limits)
        self.ends: float | None = None
        self.work: list[StepWork] = []
        self.open_tokens = 0
        self._seconds = seconds
        self._overlap = overlap
        self._running: Step | None = None
        self._queued: Step | None = None
        self._asked: dict[str, int] = {}

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: if the engine can never serve it.
        """
        self.scheduler.add(request)
        self._asked[request.id] = len(request.input_token_ids) + request.max_tokens
        self.open_tokens += self._asked[request.id]

    def finish(self) -> list[Generated]:
        """End the running step and return its tokens."""
        assert self._running is not None
        sampled = {
            chunk.request_id: 0 for chunk in self._running.chunks if chunk.samples and self.scheduler.is_live(chunk)
        }
        generated = self.scheduler.update(self._running, sampled)
        for one in generated:
            if one.finish_reason is not None:
                self.open_tokens -= self._asked.pop(one.request_id)
        self._running, self.ends = self._queued, None
        self._queued = None
        return generated

    def start(self, now: float) -> None:
        """Run the next step, if there is something to compute and nothing runs."""
        if self.ends is not None:
            return
        if self._running is None:
            self._running = self.scheduler.schedule()
        if self._running is None:
            return
        work = step_work(self._running)
        self.work.append(work)
        self.ends = now + self._seconds(work)
        if self._overlap:
            self._queued = self.scheduler.schedule()

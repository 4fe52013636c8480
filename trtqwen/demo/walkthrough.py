"""The demo: every stage of the system, on real input, with the bundled model at TP=2."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from pydantic import BaseModel, ConfigDict, TypeAdapter

from trtqwen.artifact.stage import BuildEvents
from trtqwen.build import plan_build, run_build
from trtqwen.demo import MODEL, PROMPTS
from trtqwen.recipe import load_recipe
from trtqwen.system.leftovers import workspace
from trtqwen.triton.client import Piece, stream
from trtqwen.triton.ports import Ports
from trtqwen.triton.server import TritonServer

RECIPE = "qwen2-tiny-cpu"
MAX_TOKENS = 96
WHAT = {
    "checkpoint": "TensorRT-LLM checkpoint, float32, TP=2",
    "engine": "embedded engine that reads the checkpoint's rank files",
    "repository": "the five models of the in-flight-batching repository",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True)


class StageTime(_Section):
    """Duration and description of a stage."""

    name: str
    seconds: float
    what: str


class Prompt(_Section):
    """A prompt of the demo and its language."""

    lang: str
    prompt: str


class Answer(_Section):
    """A prompt and its complete streamed answer."""

    language: str
    prompt: str
    text: str
    tokens: int


class Report(_Section):
    """What the demo measured.

    Attributes:
        tokens: answer tokens, as the engine counted them.
        iterations: steps the engine took.
        generation_seconds: from the first request sent to the last answer complete.
        max_in_flight: most requests seen at one time in the engine's batch.
    """

    stages: list[StageTime]
    answers: list[Answer]
    tokens: int
    iterations: int
    generation_seconds: float
    max_in_flight: int


class Audience(Protocol):
    """Receives the progress of the demo; several threads call `answer`."""

    def stage(self, stage: StageTime) -> None:
        """Report a finished stage."""

    def answer(self, index: int, text: str) -> None:
        """Report the text of an answer received so far."""


def load_prompts() -> list[Prompt]:
    """Load the prompts of the demo."""
    return TypeAdapter(list[Prompt]).validate_json(PROMPTS.read_bytes())


def walk(audience: Audience) -> Report:
    """Run every stage in a temporary directory. The server is stopped when this returns."""
    stages: list[StageTime] = []

    def done(name: str, seconds: float, what: str) -> None:
        stages.append(StageTime(name=name, seconds=round(seconds, 3), what=what))
        audience.stage(stages[-1])

    @contextmanager
    def timed(name: str, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        done(name, time.perf_counter() - start, what)

    with workspace("demo") as home:
        plan = plan_build(load_recipe(RECIPE), MODEL, home / "engines", home / "repository")
        events = BuildEvents(on_stage=lambda result: done(result.stage, result.seconds, WHAT[result.stage]))
        run_build(plan, events=events)
        server = TritonServer(plan.repository.directory, ports=Ports(0, 0, 0))
        try:
            with timed("triton up", "tritonserver, text models, two engine ranks"):
                server.start()
                server.wait_until_ready()
            prompts = load_prompts()
            with _EngineWatch(server.metrics_url) as watch, timed("generation", f"{len(prompts)} streams over gRPC"):
                answers = _ask_all(server.grpc_url, prompts, audience)
        finally:
            with timed("triton down", "drained; every process has exited"):
                server.stop()
    seconds = next(stage.seconds for stage in stages if stage.name == "generation")
    return Report(
        stages=stages,
        answers=answers,
        tokens=sum(answer.tokens for answer in answers),
        iterations=watch.iterations,
        generation_seconds=seconds,
        max_in_flight=watch.max_in_flight,
    )


def _ask_all(url: str, prompts: list[Prompt], audience: Audience) -> list[Answer]:
    def ask(index: int) -> Answer:
        pieces: list[Piece] = []
        for piece in stream(url, prompts[index].prompt, MAX_TOKENS):
            pieces.append(piece)
            audience.answer(index, "".join(piece.text for piece in pieces))
        return Answer(
            language=prompts[index].lang,
            prompt=prompts[index].prompt,
            text="".join(piece.text for piece in pieces),
            tokens=sum(piece.num_tokens for piece in pieces),
        )

    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(ask, range(len(prompts))))


class _EngineWatch:
    """Follows the engine's gauges at Triton's metrics endpoint while requests run."""

    def __init__(self, metrics_url: str) -> None:
        self._url = f"http://{metrics_url}/metrics"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.max_in_flight = 0
        self.iterations = 0

    def __enter__(self) -> _EngineWatch:
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while True:
            last = self._ended.wait(0.05)
            if last:
                time.sleep(0.2)  # the engine refreshes its gauges every 100 ms
            with urllib.request.urlopen(self._url, timeout=5) as response:
                text = response.read().decode()
            self.max_in_flight = max(self.max_in_flight, _gauge(text, 'request_type="scheduled"'))
            self.iterations = _gauge(text, 'general_type="iteration_counter"')
            if last:
                return


def _gauge(text: str, label: str) -> int:
    return next((int(float(line.split()[-1])) for line in text.splitlines() if label in line), 0)

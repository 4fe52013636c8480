"""Measurement of configurations: on the simulator, on an engine in this process, or on servers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from trtqwen.bench.contender import Contender, serving
from trtqwen.bench.endpoint import OnPiece, Outcome
from trtqwen.bench.figures import Figures, figures
from trtqwen.bench.load import Job, open_clients, send_all
from trtqwen.bench.run import run_phase
from trtqwen.bench.workload import Ask, Workload
from trtqwen.build import BuildPlan, plan_checkpoint, plan_engine, run_build
from trtqwen.checkpoint.convert import CheckpointStage
from trtqwen.diagnostics import EngineError, ServerError
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import Request, Response
from trtqwen.recipe import Recipe, ServeRecipe
from trtqwen.simulate.deployment import deploy
from trtqwen.simulate.run import Load, run_simulation
from trtqwen.triton.engines import Engine, open_engine
from trtqwen.triton.repository import RepositoryStage

_ANSWER_SECONDS = 600  # for the next tokens of one answer


class Bench(Protocol):
    """Measures recipes."""

    def run(self, recipe: Recipe, requests: int) -> Figures:
        """Send the first `requests` requests of the workload.

        Raises:
            TrtQwenError: if the recipe cannot be built, started or served.
        """


class SimulatorBench:
    """Forecasts; see `simulate`.

    Args:
        model: Hugging Face directory whose sizes count; None takes the recipe's `model`.
    """

    def __init__(self, workload: Workload, load: Load, model: Path | None) -> None:
        self._workload, self._load, self._model = workload, load, model

    def run(self, recipe: Recipe, requests: int) -> Figures:
        """See `Bench`."""
        part = replace(self._workload, asks=self._workload.asks[:requests])
        return run_simulation(deploy(recipe, self._model), [part], self._load).figures


class EngineBench:
    """An engine in this process, without Triton, as `batch` runs it.

    Args:
        warmup: sent before the measured requests of each run.
        home: directory for checkpoints and engines, which later runs reuse.
    """

    def __init__(self, workload: Workload, warmup: Workload, load: Load, model: Path, home: Path) -> None:
        self._workload, self._warmup, self._load, self._model, self._home = workload, warmup, load, model, home

    def run(self, recipe: Recipe, requests: int) -> Figures:
        """See `Bench`."""
        with self.opened(recipe) as engine:
            return self.measure(engine, requests)

    @contextmanager
    def opened(self, recipe: Recipe) -> Iterator[Engine]:
        """Build a recipe's engine, run it, and warm it up."""
        plan = plan_candidate(recipe, self._model, self._home)
        run_build(plan, verify=False)
        engine = open_engine(plan.engine.directory, executor_config(recipe.serve), verify=False)
        try:
            warmup = tuple(enumerate(self._warmup.asks))
            asyncio.run(send_all(EngineEndpoint(engine), Job(warmup, max(1, len(warmup)), time.monotonic())))
            yield engine
        finally:
            engine.shutdown()

    def measure(self, engine: Engine, requests: int) -> Figures:
        """Send the first requests of the workload to a running engine.

        Raises:
            EngineError: if it serves none of them.
        """
        return asyncio.run(self._measure(engine, requests))

    async def _measure(self, engine: Engine, requests: int) -> Figures:
        endpoint, places = EngineEndpoint(engine), self._load.concurrency
        asks = tuple(enumerate(self._workload.asks[:requests]))
        records = await send_all(endpoint, Job(asks, places, time.monotonic()))
        if not engine.alive or not any(record.ok for record in records):
            error = next((record.error for record in records if record.error), "the engine has stopped")
            raise EngineError(f"no request was served: {error}", "see the engine's messages above")
        return figures([records], ())


class ServerBench:
    """Triton as `serve` starts it, with the gateway in front of replicas, under the load generator of `bench`.

    Args:
        processes: of the load generator.
    """

    def __init__(
        self, workload: Workload, warmup: Workload, load: Load, model: Path, home: Path, processes: int = 1
    ) -> None:
        self._workload, self._warmup, self._load, self._model, self._home = workload, warmup, load, model, home
        self._processes = processes

    def run(self, recipe: Recipe, requests: int) -> Figures:
        """See `Bench`."""
        plan = plan_candidate(recipe, self._model, self._home)
        run_build(plan, verify=False)
        contender = Contender(plan.repository.directory.name, repository=plan.repository.directory)
        part = replace(self._workload, asks=self._workload.asks[:requests])
        with (
            serving(contender, self._home / "serve.log") as running,
            open_clients(running.target, self._processes) as clients,
        ):
            if self._warmup.asks:
                run_phase(clients, self._warmup, len(self._warmup.asks), lambda done, tokens: None)
            result = run_phase(clients, part, self._load.concurrency, lambda done, tokens: None)
        return figures([result.records], result.clients)


class EngineEndpoint:
    """`bench.endpoint.Endpoint` of an engine in this process: token ids in and out."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, ask: Ask, on_piece: OnPiece, bias: dict[int, float] | None = None) -> Outcome:
        """See `Endpoint`."""
        loop, responses = asyncio.get_running_loop(), asyncio.Queue[Response]()
        request = Request(
            id=uuid.uuid4().hex,
            input_token_ids=ask.token_ids,
            max_tokens=ask.max_tokens,
            embedding_bias=bias or {},
        )
        self._engine.submit(request, lambda one: _hand_over(loop, lambda: responses.put_nowait(one)))
        outcome = Outcome(prompt_tokens=len(ask.token_ids))
        while True:
            try:
                response = await asyncio.wait_for(responses.get(), _ANSWER_SECONDS)
            except asyncio.TimeoutError:
                self._engine.cancel(request.id)
                raise ServerError(f"no token came for {_ANSWER_SECONDS} s") from None
            if response.error is not None:
                raise ServerError(response.error)
            if response.token_ids:
                on_piece(len(response.token_ids))
                outcome.output_tokens += len(response.token_ids)
            if response.finish_reason is not None:
                return outcome

    async def close(self) -> None:
        """Leave the engine running, because its owner stops it."""


def _hand_over(loop: asyncio.AbstractEventLoop, put: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(put)


def executor_config(serve: ServeRecipe) -> ExecutorConfig:
    """Return the executor's settings for a recipe's serving settings."""
    names = ExecutorConfig.model_fields.keys() & ServeRecipe.model_fields.keys()
    return ExecutorConfig.model_validate({name: getattr(serve, name) for name in names})


def plan_candidate(recipe: Recipe, model: Path, home: Path) -> BuildPlan:
    """Plan the build of a candidate. Its directories are named by their inputs, so that candidates share equal parts.

    Raises:
        InputError: if the model cannot be converted or built as asked.
    """
    conversion = plan_checkpoint(recipe, model)
    checkpoint = CheckpointStage(conversion, home / f"checkpoint-{_short(conversion.key())}")
    engine = plan_engine(recipe, checkpoint, home / "engine")
    engine.directory = home / f"engine-{_short(engine.key())}"
    served = json.dumps([engine.key(), recipe.serve.model_dump(mode="json")], sort_keys=True)
    name = hashlib.sha256(served.encode()).hexdigest()
    repository = RepositoryStage(engine.directory, engine.key(), recipe.serve, home / f"repository-{_short(name)}")
    return BuildPlan(recipe, checkpoint, engine, repository)


def _short(key: str) -> str:
    return key.rpartition(":")[2][:12]


def needs_servers(recipe: Recipe, layouts: bool) -> bool:
    """Return whether candidates of this recipe run behind Triton, as all but single embedded engines do."""
    return recipe.engine.backend != "torch" or recipe.serve.replicas > 1 or layouts

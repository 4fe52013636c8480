"""One simulated load test: the workloads of `bench`, its figures, and the bound next to the forecast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtqwen import __version__
from trtqwen.bench.figures import Figures, Goodput, figures
from trtqwen.bench.records import RequestRecord
from trtqwen.bench.setup import WorkloadOptions, make_workloads, named_workloads
from trtqwen.bench.workload import Workload, shapes
from trtqwen.diagnostics import InputError
from trtqwen.facts.cards import card_facts
from trtqwen.hf.checks import has_tokenizer
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.simulate.corrections import corrections
from trtqwen.simulate.cost import Totals
from trtqwen.simulate.deployment import Deployment
from trtqwen.simulate.play import OnDone, play

_PLAIN_IDS = 256  # a vocabulary begins with bytes; a drawn prompt takes none of them


@dataclass(frozen=True)
class Load:
    """Settings of a simulated load test.

    Attributes:
        concurrency: requests open at a time (closed loop); None sends them at their times.
        served: count the server process between engine and clients.
    """

    concurrency: int | None
    served: bool = False


@dataclass(frozen=True)
class Bound:
    """The bound: the fastest result that the data sheet allows for the scheduler's steps.

    Attributes:
        seconds: all work takes at least.
        limit: the resource that decides.
        output_token_throughput: tokens per second at most.
        totals: of the busiest replica.
    """

    seconds: float
    limit: str
    output_token_throughput: float
    totals: Totals


@dataclass(frozen=True)
class Simulation:
    """A simulated load test.

    Attributes:
        records: of each repeat.
        steps: of all replicas and repeats.
        paused: how often a request lost its KV cache blocks.
        reused_blocks: how often a KV cache block was found computed already.
        fullest: most requests that shared a step.
    """

    deployment: Deployment
    workloads: tuple[Workload, ...]
    load: Load
    figures: Figures
    records: tuple[tuple[RequestRecord, ...], ...]
    bound: Bound
    steps: int
    paused: int
    reused_blocks: int
    fullest: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes about the forecast."""
        recipe = self.deployment.recipe
        assert recipe.host is not None
        own = corrections().engines[recipe.engine.backend]
        found = [f"The forecast's fixed time of a step is from one workload: {own.calibrated_on}."]
        if recipe.host.card not in own.measured_cards:
            title = card_facts(recipe.host.card).title
            found.append(f"No measurement of the {title} with this engine is known: these figures are forecasts.")
        if recipe.checkpoint.tp_size > 1:
            link = self.deployment.link
            found.append(f"All-reduce is assumed to take {link.latency_us:g} us and {link.bus_gb_per_s:g} GB/s.")
        if not self.load.served:
            found.append("The time between engine and clients is not counted.")
        return tuple(found)

    def as_json(self) -> dict[str, Any]:
        """The figures under the names of `bench`, and the bound."""
        recipe, plan = self.deployment.recipe, self.deployment.plan
        return {
            "schema_version": "1.0",
            "tool": f"trtqwen simulate {__version__}",
            "kind": "forecast",
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "input_config": {
                "loadgen": {
                    **asdict(self.load),
                    "mode": "open loop" if self.load.concurrency is None else "closed loop",
                },
                "workload": {"name": self.workloads[0].name, "sha256": [one.digest for one in self.workloads]},
            },
            "bound": asdict(self.bound),
            "forecast": self.figures.as_json(),
            "schedule": {
                "steps": self.steps,
                "kv_tokens": plan.kv_tokens,
                "paused": self.paused,
                "reused_blocks": self.reused_blocks,
                "max_active": self.fullest,
            },
            "notes": list(self.notes),
        }


def simulated_workloads(
    options: WorkloadOptions, deployment: Deployment, model: Path | None, count: int
) -> list[Workload]:
    """The workloads of a simulation; with a model directory they are those that `bench` sends.

    Raises:
        InputError: if there is no such workload, or a file of one needs the model's tokenizer.
    """
    if model is not None and has_tokenizer(model):
        return make_workloads(options, Tokenizer(model), count)
    if options.workload in shapes():
        return named_workloads(options, range(_PLAIN_IDS, deployment.config.vocab_size), count)
    if Path(options.workload).is_file():
        raise InputError(
            f"{options.workload}: a workload file needs the tokenizer of the model", "pass --model with its directory"
        )
    return named_workloads(options, (), count)  # it says which names there are


def run_simulation(
    deployment: Deployment,
    workloads: Sequence[Workload],
    load: Load,
    *,
    goodput: Goodput | None = None,
    on_repeat: Callable[[str, int], OnDone] = lambda title, total: lambda count: None,
) -> Simulation:
    """Simulate a load test.

    Args:
        workloads: one for each repeat.
        on_repeat: called when a repeat begins, with its title and its number of requests; what it returns is called
            for each request that ends.

    Raises:
        InputError: if requests have no arrival times and `load` no concurrency, the server's time is not known, or
            no request can be served.
    """
    backend = deployment.recipe.engine.backend
    token_seconds = 0.0
    if load.served:
        serving = corrections().serving.get(backend)
        if serving is None:
            raise InputError(
                f"the time of the server process is not known for backend {backend}", "leave out --served"
            )
        token_seconds = serving.token_us * 1e-6
    repeats: list[tuple[RequestRecord, ...]] = []
    totals: list[Totals] = []
    steps = paused = reused = fullest = 0
    for number, workload in enumerate(workloads, 1):
        if load.concurrency is None and not workload.timed:
            raise InputError(f"workload {workload.name} has no arrival times", "pass --rate or --concurrency")
        engines = deployment.engines()
        on_done = on_repeat(f"repeat {number} of {len(workloads)}", len(workload.asks))
        records = play(
            workload.asks, engines, concurrency=load.concurrency, token_seconds=token_seconds, on_done=on_done
        )
        if not any(record.ok for record in records):
            raise InputError(f"no request can be served, the first: {records[0].error}", "change recipe or workload")
        repeats.append(records)
        totals.append(max((deployment.cost.bound(engine.work) for engine in engines), key=lambda one: one.least))
        for engine in engines:
            stats = engine.scheduler.stats()
            steps, paused, reused = steps + stats.iterations, paused + stats.paused, reused + stats.reused_blocks
            fullest = max(fullest, stats.max_active)
    tokens = sum(record.output_tokens for records in repeats for record in records)
    total = Totals(*(sum(getattr(one, name) for one in totals) for name in ("compute", "bandwidth", "link")))
    bound = Bound(total.least, total.limit, tokens / total.least if total.least else math.inf, total)
    return Simulation(
        deployment=deployment,
        workloads=tuple(workloads),
        load=load,
        figures=figures(repeats, (), goodput),
        records=tuple(repeats),
        bound=bound,
        steps=steps,
        paused=paused,
        reused_blocks=reused,
        fullest=fullest,
    )

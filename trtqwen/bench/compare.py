"""Compare several servers under the same loads, alternating on the same machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trtqwen import __version__
from trtqwen.artifact.journal import journal_digest
from trtqwen.artifact.manifest import MANIFEST
from trtqwen.bench.agreement import Agreement, Answers, ask_for_answers, compare_answers
from trtqwen.bench.contender import Contender, serving, with_vocabulary
from trtqwen.bench.figures import Figures, Rate, confidence, figures
from trtqwen.bench.load import open_clients
from trtqwen.bench.records import RequestRecord
from trtqwen.bench.run import LoadSettings, about_host, run_phase
from trtqwen.bench.setup import WorkloadOptions, make_workloads
from trtqwen.bench.visits import Visit, Visits
from trtqwen.bench.workload import Workload
from trtqwen.engine.config import EngineConfig
from trtqwen.hf.tokenizer import Tokenizer

OnStep = Callable[[str], None]
LOWER_IS_BETTER = (
    ("time_to_first_token", "p50"),
    ("time_to_first_token", "p99"),
    ("inter_token_latency", "p50"),
    ("request_latency", "p99"),
)
_MARGIN = 0.03  # a difference below is none


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison.

    Attributes:
        turns: how often each one is started and measured; at least three.
        answer_tokens: of each greedy answer; 0 leaves agreement out.
        text_tokens: of the text whose perplexity is taken.
    """

    workloads: tuple[WorkloadOptions, ...]
    load: LoadSettings
    turns: int
    answer_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Side:
    """Measurements of one contender.

    Attributes:
        startup: seconds, and memory in GiB under load: of all processes, and of the GPUs; None for an address.
        figures, repeats: by workload.
    """

    contender: Contender
    about: dict[str, Any]
    startup: Rate | None
    host_gib: Rate | None
    gpu_gib: Rate | None
    figures: Mapping[str, Figures]
    repeats: Mapping[str, tuple[tuple[RequestRecord, ...], ...]]
    answers: Answers | None


@dataclass(frozen=True)
class Loss:
    """A measure in which a contender is worse than the best one.

    Attributes:
        where: workload, or empty for what does not depend on one.
        factor: how many times worse than the best's value.
    """

    contender: str
    best: str
    where: str
    metric: str
    value: float
    best_value: float
    factor: float


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        digests: of the requests of each turn, by workload; all contenders had the same.
        agreements: of each contender with the first one, by name.
    """

    sides: tuple[Side, ...]
    settings: CompareSettings
    digests: Mapping[str, tuple[str, ...]]
    agreements: Mapping[str, Agreement]
    losses: tuple[Loss, ...]
    about: dict[str, Any]
    started: str

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": "1.0",
            "tool": f"trtqwen compare {__version__}",
            "start_time": self.started,
            "about": self.about,
            "settings": {
                "workloads": [asdict(options) for options in self.settings.workloads],
                "loadgen": {**asdict(self.settings.load), "mode": self.settings.load.mode},
                "turns": self.settings.turns,
            },
            "sha256": {name: list(digests) for name, digests in self.digests.items()},
            "contenders": [_side_json(side) for side in self.sides],
            "agreement_with_the_first": {name: asdict(one) for name, one in self.agreements.items()},
            "losses": [asdict(loss) for loss in self.losses],
        }


def comparison_digest(contenders: Sequence[Contender], settings: CompareSettings, tokenizer: Path | None) -> str:
    """Return a digest of everything that the measurements depend on, manifests of repositories included."""
    sides = []
    for contender in contenders:
        manifest = None
        if contender.repository is not None:
            manifest = (contender.repository / MANIFEST).read_text(encoding="utf-8")
        sides.append([contender.name, str(contender.repository), contender.url, manifest])
    return journal_digest([sides, asdict(settings), str(tokenizer)])


def run_compare(
    contenders: Sequence[Contender],
    tokenizer: Tokenizer,
    config: EngineConfig | None,
    settings: CompareSettings,
    logs: Path,
    visits: Visits,
    on_step: OnStep = lambda step: None,
) -> Comparison:
    """Measure the contenders alternately (A, B, A, B and so on), with a new start for each measurement.

    Args:
        config: with the sizes of the model; None if no contender is local.
        logs: directory for the servers' logs.
        visits: measurements of an interrupted run, which are reused.

    Raises:
        ServerError: if a contender does not start, or fails every request of a workload.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    # One for each turn, and one that warms up.
    workloads = {
        options.workload: make_workloads(options, tokenizer, settings.turns + 1) for options in settings.workloads
    }
    made: list[list[Visit]] = [[] for _ in contenders]
    for turn in range(settings.turns):
        for contender, own in zip(contenders, made, strict=True):
            step = f"turn {turn + 1} of {settings.turns}: {contender.name}"
            visit = visits.find(contender.name, turn)
            if visit is None:
                visit = _visit(contender, turn, tokenizer, config, settings, workloads, logs, step, on_step)
                visits.add(visit)
            else:
                on_step(f"{step}: measured before")
            own.append(visit)
    sides = tuple(_side(contender, own) for contender, own in zip(contenders, made, strict=True))
    agreements = {}
    if sides[0].answers is not None:
        agreements = {
            side.contender.name: compare_answers(sides[0].answers, side.answers)
            for side in sides[1:]
            if side.answers is not None
        }
    digests = {name: tuple(one.digest for one in drawn[1:]) for name, drawn in workloads.items()}
    return Comparison(sides, settings, digests, agreements, find_losses(sides), about_host(), started)


def _visit(
    contender: Contender,
    turn: int,
    tokenizer: Tokenizer,
    config: EngineConfig | None,
    settings: CompareSettings,
    workloads: Mapping[str, Sequence[Workload]],
    logs: Path,
    step: str,
    on_step: OnStep,
) -> Visit:
    """Start a contender, send it every workload, and stop it."""
    answers, results = None, {}
    on_step(f"{step}: starting")
    with serving(contender, logs / f"{_file_name(contender.name)}.log") as running:
        if turn == 0 and settings.answer_tokens:
            on_step(f"{step}: answers")
            target = with_vocabulary(running, config, tokenizer.stop_ids)
            answers = ask_for_answers(target, tokenizer, settings.answer_tokens, settings.text_tokens)
        with open_clients(running.target, settings.load.processes) as clients:
            for name, (first, *others) in workloads.items():
                on_step(f"{step}: {name}")
                warmup = replace(first, asks=first.asks[: settings.load.warmup])
                if warmup.asks:
                    run_phase(clients, warmup, settings.load.concurrency or 16, lambda done, tokens: None)
                results[name] = run_phase(clients, others[turn], settings.load.concurrency, lambda done, tokens: None)
        return Visit(contender.name, turn, running.about, running.startup, running.memory, answers, results)


def _side(contender: Contender, visits: Sequence[Visit]) -> Side:
    """Combine all visits of a contender."""
    results = {name: [visit.results[name] for visit in visits] for name in visits[0].results}
    startups = [visit.startup for visit in visits if visit.startup is not None]
    memories = [visit.memory for visit in visits if visit.memory is not None]
    return Side(
        contender=contender,
        about=visits[-1].about,
        startup=_rate("sec", startups),
        host_gib=_rate("GiB", [memory["host_gib"] for memory in memories]),
        gpu_gib=_rate("GiB", [memory["gpu_gib"] for memory in memories]),
        figures={
            name: figures([one.records for one in runs], [client for one in runs for client in one.clients])
            for name, runs in results.items()
        },
        repeats={name: tuple(one.records for one in runs) for name, runs in results.items()},
        answers=visits[0].answers,
    )


def find_losses(sides: Sequence[Side]) -> tuple[Loss, ...]:
    """Find the measures in which a contender is worse than the best one by more than the noise of both."""
    losses: list[Loss] = []

    def look(where: str, metric: str, values: Mapping[str, tuple[float, float | None]], *, lower: bool) -> None:
        if len(values) < 2:
            return
        best = (min if lower else max)(values, key=lambda name: values[name][0])
        best_value, best_noise = values[best]
        if best_value <= 0:
            return
        for name, (value, noise) in values.items():
            apart = abs(value - best_value) > (noise or 0) + (best_noise or 0)
            worse = value / best_value if lower else best_value / value if value else float("inf")
            if name != best and apart and worse > 1 + _MARGIN:
                losses.append(Loss(name, best, where, metric, value, best_value, worse))

    for workload in sides[0].figures:
        for metric in ("output_token_throughput", "success_rate"):
            rates = {side.contender.name: side.figures[workload].rates[metric] for side in sides}
            look(workload, metric, {name: (rate.avg, rate.ci95) for name, rate in rates.items()}, lower=False)
        for metric, column in LOWER_IS_BETTER:
            values = {}
            for side in sides:
                found = side.figures[workload].distributions.get(metric)
                if found is not None:
                    noise = found.p50_ci95 if column == "p50" else found.p99_ci95
                    values[side.contender.name] = (found.percentiles[int(column[1:])], noise)
            look(workload, f"{metric} {column}", values, lower=True)
    for metric in ("startup", "host_gib", "gpu_gib"):
        known = {side.contender.name: getattr(side, metric) for side in sides if getattr(side, metric) is not None}
        look("", metric, {name: (rate.avg, rate.ci95) for name, rate in known.items()}, lower=True)
    perplexities = {
        side.contender.name: (side.answers.perplexity, None)
        for side in sides
        if side.answers is not None and side.answers.perplexity is not None
    }
    look("", "perplexity", perplexities, lower=True)
    return tuple(sorted(losses, key=lambda loss: -loss.factor))


def _rate(unit: str, values: Sequence[float]) -> Rate | None:
    return Rate(unit, sum(values) / len(values), confidence(values), tuple(values)) if values else None


def _side_json(side: Side) -> dict[str, Any]:
    measured = {name: getattr(side, name) for name in ("startup", "host_gib", "gpu_gib")}
    return {
        "name": side.contender.name,
        "about": side.about,
        **{name: None if rate is None else rate.as_json() for name, rate in measured.items()},
        "perplexity": None if side.answers is None else side.answers.perplexity,
        "workloads": {name: found.as_json() for name, found in side.figures.items()},
    }


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in name)

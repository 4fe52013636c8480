"""The search: valid candidates that fit into memory, measured by successive halving, with a journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trtqwen import __version__
from trtqwen.artifact.journal import journal_digest
from trtqwen.diagnostics import InputError, TrtQwenError, first_hint, first_problem
from trtqwen.plan.plan import plan_recipe
from trtqwen.recipe import Recipe
from trtqwen.tune.bench import Bench
from trtqwen.tune.halving import budgets, successive_halving
from trtqwen.tune.space import Configuration, Space, configurations, own_configuration, size
from trtqwen.tune.target import Measures, Target
from trtqwen.tune.trials import Trial, Trials

_MOST_INVALID = 20  # configurations that are looked at for each that is wanted


class TargetMissed(TrtQwenError):
    """No configuration is within the limits."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Attributes:
        candidates: number of configurations to run, the recipe's own included.
        requests: of a full run.
        rungs: lengths of runs.
        factor: between two lengths, and between the numbers of candidates on two rungs.
        seed: of the choice of candidates.
    """

    candidates: int
    requests: int
    rungs: int = 3
    factor: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """A configuration and its longest run.

    Attributes:
        title: what differs from the recipe.
        whole: whether it got a full run.
        misses: limits that it exceeds, in words.
        front: whether no other whole run has both more throughput and less latency.
    """

    title: str
    changes: dict[str, Any]
    requests: int
    measures: Measures | None
    whole: bool = False
    misses: tuple[str, ...] = ()
    front: bool = False
    cause: str | None = None

    @property
    def state(self) -> str:
        """Its state: the target is met or missed, or it was dropped, failed or pruned."""
        if self.measures is None:
            return "failed" if self.requests else "pruned"
        if not self.whole:
            return "dropped"
        return "misses" if self.misses else "meets"


@dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
        rows: the best first; dropped, failed and pruned ones at the end.
        best: the row of the tuned recipe; None if none meets the target.
        own: the recipe's own row.
        runs, reused: number of all runs, and of those from an interrupted search.
        whole_runs: the requests of all runs in whole runs.
        space: combinations in the space.
    """

    recipe: Recipe
    target: Target
    settings: SearchSettings
    rows: tuple[Row, ...]
    best: Row | None
    own: Row
    runs: int
    reused: int
    whole_runs: float
    space: int
    about: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": "1.0",
            "tool": f"trtqwen tune {__version__}",
            "recipe": self.recipe.name,
            "about": self.about,
            "target": asdict(self.target),
            "settings": asdict(self.settings),
            "space": self.space,
            "runs": self.runs,
            "reused_runs": self.reused,
            "whole_runs": self.whole_runs,
            "best": None if self.best is None else asdict(self.best),
            "rows": [{**asdict(row), "state": row.state} for row in self.rows],
        }

    def check(self) -> None:
        """Raise unless a configuration meets the target.

        Raises:
            TargetMissed: naming the nearest, its worst limit and by how much it exceeds it.
        """
        if self.best is not None:
            return
        nearest = next((row for row in self.rows if row.whole), None)
        if nearest is None or nearest.measures is None:
            causes = [row.cause for row in self.rows if row.cause]
            raise TargetMissed(
                f"{self.recipe.name}: no configuration could be run; the first: {causes[0] if causes else 'none'}",
                "correct the recipe, or sweep other fields",
            )
        worst = self.target.misses(nearest.measures)[0]
        raise TargetMissed(
            f"{self.recipe.name}: no configuration meets the target; the nearest is {nearest.title}: "
            f"{worst.what}, {worst.excess:.0%} beyond it",
            "raise the limit, lower --concurrency, or sweep other fields",
        )


@dataclass(frozen=True)
class Progress:
    """The progress of a search after a run.

    Attributes:
        title, trial: of the run.
        reused: whether it is from an interrupted search.
        done, total: runs.
        best: title and measures of the best so far on the longest rung; None while none ran.
    """

    title: str
    trial: Trial
    reused: bool
    done: int
    total: int
    best: tuple[str, Measures] | None


OnProgress = Callable[[Progress], None]


def search_digest(
    content: Mapping[str, Any], space: Space, target: Target, settings: SearchSettings, about: Mapping[str, Any]
) -> str:
    """A digest of everything that the trials of a search depend on."""
    parts = [__version__, content, {name: list(values) for name, values in space.items()}, asdict(target)]
    return journal_digest([*parts, asdict(settings), about])


class Searcher:
    """Finds the best configuration of a recipe.

    Args:
        content: of the recipe file.
        model: Hugging Face directory whose sizes count for the plan.
    """

    def __init__(
        self,
        recipe: Recipe,
        content: Mapping[str, Any],
        space: Space,
        target: Target,
        settings: SearchSettings,
        bench: Bench,
        trials: Trials,
        *,
        model: Path | None,
        about: dict[str, Any],
        on_progress: OnProgress = lambda progress: None,
    ) -> None:
        self._recipe, self._content, self._space, self._target = recipe, content, space, target
        self._settings, self._bench, self._trials, self._model = settings, bench, trials, model
        self._about, self._on_progress = about, on_progress
        self._own = own_configuration(recipe, space)
        self._recipes: dict[Configuration, Recipe] = {}
        self._longest: dict[Configuration, Trial] = {}
        self._done = self._requests = self._total = 0

    def run(self) -> Search:
        """Search.

        Raises:
            InputError: if the recipe itself cannot be planned.
        """
        pruned = self._choose()
        lengths = budgets(self._settings.requests, self._settings.rungs, self._settings.factor)
        self._total = _runs(len(self._recipes), len(lengths), self._settings.factor)
        arms = sorted(self._recipes, key=lambda one: one.distance(self._own))  # of two alike the simpler one counts
        successive_halving(arms, lengths, self._settings.factor, self._run, keep=self._own)
        rows = self._rows()
        own = next(row for row in rows if row.title == self._own.title(self._own))
        best = next((row for row in rows if row.whole and not row.misses), None)
        return Search(
            recipe=self._recipe,
            target=self._target,
            settings=self._settings,
            rows=(*rows, *pruned),
            best=best,
            own=own,
            runs=self._done,
            reused=self._trials.reused,
            whole_runs=self._requests / self._settings.requests,
            space=size(self._space),
            about=self._about,
        )

    def _choose(self) -> list[Row]:
        """Choose candidates; return also the rows of those that are refused without a run."""
        pruned = []
        looked_at = self._settings.candidates * _MOST_INVALID
        for number, configuration in enumerate(configurations(self._recipe, self._space, self._settings.seed)):
            if len(self._recipes) == self._settings.candidates or number == looked_at:
                break
            try:
                self._recipes[configuration] = self._planned(configuration)
            except InputError as problem:
                if configuration == self._own:
                    raise
                pruned.append(Row(self._title(configuration), configuration.changes, 0, None, cause=problem.what))
        return pruned

    def _planned(self, configuration: Configuration) -> Recipe:
        """The recipe of a configuration.

        Raises:
            InputError: if it is not valid, or its plan does not fit.
        """
        try:
            recipe = Recipe.model_validate({**configuration.apply(self._content), "name": self._recipe.name})
        except ValidationError as problem:
            raise InputError(first_problem(problem), first_hint(problem) or "change the recipe") from None
        for finding in plan_recipe(recipe, self._model).findings:
            if finding.level == "error":
                raise InputError(finding.what, finding.hint)
        return recipe

    def _run(self, configuration: Configuration, requests: int) -> tuple[float, ...] | None:
        trial = self._trials.find(configuration.changes, requests)
        reused = trial is not None
        if trial is None:
            trial = self._measure(configuration, requests)
            self._trials.add(trial)
        self._done, self._requests = self._done + 1, self._requests + requests
        self._longest[configuration] = trial
        self._on_progress(
            Progress(self._title(configuration), trial, reused, self._done, self._total, self._best_so_far())
        )
        return None if trial.measures is None else self._target.rank(trial.measures)

    def _measure(self, configuration: Configuration, requests: int) -> Trial:
        begun = time.monotonic()
        try:
            measures, cause = self._target.measures(self._bench.run(self._recipes[configuration], requests)), None
        except TrtQwenError as problem:
            measures, cause = None, problem.what
        return Trial(configuration.changes, requests, time.monotonic() - begun, measures, cause)

    def _best_so_far(self) -> tuple[str, Measures] | None:
        longest = max((trial.requests for trial in self._longest.values() if trial.measures), default=0)
        found = [
            (self._title(configuration), trial.measures)
            for configuration, trial in self._longest.items()
            if trial.measures is not None and trial.requests == longest
        ]
        return min(found, key=lambda pair: self._target.rank(pair[1]), default=None)

    def _rows(self) -> list[Row]:
        rows = []
        for configuration, trial in self._longest.items():
            misses = () if trial.measures is None else self._target.misses(trial.measures)
            whole = trial.measures is not None and trial.requests == self._settings.requests
            words = tuple(miss.what for miss in misses)
            title = self._title(configuration)
            rows.append(Row(title, trial.changes, trial.requests, trial.measures, whole, words, cause=trial.cause))
        front = pareto_front([row.measures for row in rows if row.whole and row.measures is not None])
        return sorted((replace(row, front=row.whole and row.measures in front) for row in rows), key=self._order)

    def _order(self, row: Row) -> tuple[float, ...]:
        if row.measures is None:
            return (2, -row.requests)
        return (0 if row.whole else 1, -row.requests, *self._target.rank(row.measures))

    def _title(self, configuration: Configuration) -> str:
        return configuration.title(self._own)


def pareto_front(measures: list[Measures]) -> list[Measures]:
    """Return the rows that no other one beats in both throughput and mean latency, by rising latency."""
    front: list[Measures] = []
    for one in sorted(measures, key=lambda one: (one.mean_latency, -one.throughput)):
        if not front or one.throughput > front[-1].throughput:
            front.append(one)
    return front


def _runs(candidates: int, rungs: int, factor: int) -> int:
    total, alive = 0, candidates
    for _ in range(rungs):
        total, alive = total + alive, -(-alive // factor)
    return total

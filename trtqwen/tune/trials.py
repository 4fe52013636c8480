"""The trials of a search so far."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtqwen.artifact.journal import Journal
from trtqwen.tune.target import Measures

JOURNAL = "tune.jsonl"


@dataclass(frozen=True)
class Trial:
    """One run of a configuration.

    Attributes:
        changes: the fields that the configuration sets.
        requests: length of the run.
        seconds: that it took, the start of the engine included.
        measures: None if it failed.
        cause: why it failed, or was never run.
    """

    changes: dict[str, Any]
    requests: int
    seconds: float
    measures: Measures | None
    cause: str | None = None


class Trials:
    """The trials of a search, kept in a journal.

    Args:
        digest: of everything that the measurements depend on.
        force: drop the trials of another search.

    Attributes:
        reused: trials of earlier runs.

    Raises:
        OutputError: if the file is of another search and `force` is not set.
    """

    def __init__(self, directory: Path, digest: str, *, force: bool = False) -> None:
        self._journal = Journal(
            directory / JOURNAL,
            digest,
            other="is of another search (recipe, workload, space or target differ)",
            hint="choose another --output, or pass --force to start again",
            force=force,
        )
        self._trials: dict[str, Trial] = {}
        for entry in self._journal.entries:
            measures = None if entry["measures"] is None else Measures(**entry["measures"])
            trial = Trial(**{**entry, "measures": measures})
            self._trials[_key(trial.changes, trial.requests)] = trial
        self.reused = len(self._trials)

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(self._trials.values())

    def find(self, changes: dict[str, Any], requests: int) -> Trial | None:
        """The trial of a configuration with a run of this length."""
        return self._trials.get(_key(changes, requests))

    def add(self, trial: Trial) -> None:
        """Keep a trial; it is on the disk when this returns."""
        self._trials[_key(trial.changes, trial.requests)] = trial
        self._journal.add(asdict(trial))

    def close(self) -> None:
        self._journal.close()


def _key(changes: dict[str, Any], requests: int) -> str:
    return json.dumps([changes, requests], sort_keys=True)

"""What a search has measured so far, in a file, so that a killed search goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import OutputError
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


class Journal:
    """The trials of a search, one JSON object a line behind a first line that says which search it is.

    Args:
        digest: of everything that the measurements depend on.
        force: drop the trials of another search.

    Raises:
        OutputError: if the file is of another search and `force` is not set.
    """

    def __init__(self, directory: Path, digest: str, *, force: bool = False) -> None:
        self._path = directory / JOURNAL
        self._trials: dict[str, Trial] = {}
        self.reused = 0
        lines = self._read()
        if lines and lines[0].get("digest") != digest:
            if not force:
                raise OutputError(
                    f"{self._path}: is of another search (recipe, workload, space or target differ)",
                    "choose another --output, or pass --force to begin anew",
                )
            lines = []
        for line in lines[1:]:
            measures = None if line["measures"] is None else Measures(**line["measures"])
            trial = Trial(**{**line, "measures": measures})
            self._trials[_key(trial.changes, trial.requests)] = trial
        self.reused = len(self._trials)
        text = "".join(json.dumps(line) + "\n" for line in (lines or [{"digest": digest}]))
        temporary = self._path.with_suffix(".new")
        temporary.write_text(text, encoding="utf-8")  # without a last line that a kill has cut
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(self._trials.values())

    def find(self, changes: dict[str, Any], requests: int) -> Trial | None:
        """The trial of a configuration with a run of this length."""
        return self._trials.get(_key(changes, requests))

    def add(self, trial: Trial) -> None:
        """Keep a trial; it is on the disk when this returns."""
        self._trials[_key(trial.changes, trial.requests)] = trial
        self._file.write(json.dumps(asdict(trial)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines of the file; of a kill in the middle of one remains a part, which is dropped."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = []
        for line in text.split("\n")[:-1]:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines


def _key(changes: dict[str, Any], requests: int) -> str:
    return json.dumps([changes, requests], sort_keys=True)

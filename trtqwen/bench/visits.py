"""The measurements of a comparison so far: one visit for each contender and turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trtqwen.artifact.journal import Journal
from trtqwen.bench.agreement import Answers
from trtqwen.bench.load import RunResult

JOURNAL = "compare.jsonl"


@dataclass(frozen=True)
class Visit:
    """The measurements of a contender between its start and its stop.

    Attributes:
        startup: seconds until it answered; None for an address.
        memory: in use under load: GiB of all processes, and of all GPUs; None for an address.
        answers: of the first turn, where they are asked for.
        results: by workload.
    """

    contender: str
    turn: int
    about: dict[str, Any]
    startup: float | None
    memory: dict[str, float] | None
    answers: Answers | None
    results: Mapping[str, RunResult]


class Visits:
    """The visits of an unfinished comparison, in a journal.

    Args:
        digest: of contenders and settings.

    Raises:
        OutputError: if the directory holds the journal of another comparison.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        path = directory / JOURNAL
        self._journal = Journal(
            path,
            digest,
            other="is of another comparison, which was stopped (contenders, workloads or load differ)",
            hint="choose another --output, or delete this file",
        )
        self._adapter = TypeAdapter(Visit)
        visits = map(self._adapter.validate_python, self._journal.entries)
        self._visits = {(visit.contender, visit.turn): visit for visit in visits}

    def find(self, contender: str, turn: int) -> Visit | None:
        """The visit that an earlier run made."""
        return self._visits.get((contender, turn))

    def add(self, visit: Visit) -> None:
        """Keep a visit; it is on the disk when this returns."""
        self._journal.add(self._adapter.dump_python(visit, mode="json"))

    def close(self) -> None:
        """Leave the visits to the next run."""
        self._journal.close()

    def remove(self) -> None:
        """Forget the visits: the comparison is written."""
        self._journal.remove()

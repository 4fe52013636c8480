"""From a log to causes and remedies, by the patterns in `failures.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_FACTS = Path(__file__).with_name("failures.json")


class Failure(BaseModel):
    """One known failure.

    Attributes:
        pattern: regular expression that its line matches.
        after: regular expression that an earlier line must match.
        last: whether only the log's last line counts: the program hung there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    after: str | None = None
    last: bool = False
    cause: str
    hint: str


@dataclass(frozen=True)
class Finding:
    """A line of a log that tells what went wrong.

    Attributes:
        number: of the line, from 1.
        times: how many lines say the same.
    """

    number: int
    line: str
    times: int
    cause: str
    hint: str


def explain(lines: Iterable[str]) -> list[Finding]:
    """Known failures in a log, the most telling first: causes before what follows from them."""
    known = [_Search(failure) for failure in failures()]
    number, text = 0, ""
    for counted, line in enumerate(lines, 1):
        if line.strip():
            number, text = counted, line.strip()
            for search in known:
                search.see(number, text)
    return [finding for search in known for finding in search.result(number)]


class _Search:
    """One failure, looked for line by line."""

    def __init__(self, failure: Failure) -> None:
        self._failure = failure
        self._pattern = re.compile(failure.pattern)
        self._after = re.compile(failure.after) if failure.after else None
        self._hits: list[tuple[int, str]] = []
        self._times = 0

    def see(self, number: int, line: str) -> None:
        if self._after is not None:
            if self._after.search(line):
                self._after = None
            return
        if self._pattern.search(line):
            self._times += 1
            self._hits = [(number, line)] if self._failure.last or not self._hits else self._hits

    def result(self, last: int) -> Iterator[Finding]:
        for number, line in self._hits:
            if not self._failure.last or number == last:
                yield Finding(number, line, self._times, self._failure.cause, self._failure.hint)


@cache
def failures() -> tuple[Failure, ...]:
    content = json.loads(_FACTS.read_text(encoding="utf-8"))
    return tuple(Failure.model_validate(entry) for entry in content["failures"])

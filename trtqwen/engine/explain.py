"""Find causes and hints for a log, with the patterns in `failures.json` and the tables in `failure_tables.json`.

An entry of `failures.json` is a kind of failure. If the kind has numbered or named members, such as the errors of
CUDA, the statuses of Triton or the exceptions of Python, a table gives the meaning of each member.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trtqwen.engine.log import Chunk, Line, Log, key, shown, spaced, squeezed

_FACTS = Path(__file__).with_name("failures.json")
_TABLES = Path(__file__).with_name("failure_tables.json")

Role = Literal["cause", "symptom", "echo", "note"]
_ROLES: tuple[Role, ...] = ("cause", "symptom", "echo", "note")
_REACH = 240  # characters, without white space, that `.*` spans at most
_HITS = 100  # lines of one kind that are kept
_QUOTED = 160  # characters of a log that a cause quotes at most


class Row(BaseModel):
    """One member of a kind.

    Attributes:
        keys: spellings of the member in logs: number, name, text.
        means: its meaning; fills `{means}` of the entry.
        hint: what to do; fills `{help}` of the entry.
        role: replaces the role of the entry.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[str, ...]
    means: str
    hint: str
    role: Role | None = None


class Failure(BaseModel):
    """One known kind of failure.

    Attributes:
        id: a short, stable name.
        role: `cause` ends the search; a `symptom` says where to look; an `echo` follows from an earlier error; a
            `note` is harmless by itself.
        pattern: regular expression; white space in it and in the log does not count. `KEYS` stands for every key of
            the table.
        line: match single lines, with their white space, instead.
        telling: match only in lines that look like errors.
        certain: stays a cause on a line that its program calls a warning or information.
        placed: match only if a traceback leads to a known part of a program.
        table: where the group `key` of the pattern is looked up; a key without a row does not count.
        unless: regular expression; a line that also matches it does not count.
        after: regular expression that an earlier line must match.
        unless_after: regular expression; lines after a line that matches it do not count.
        last: whether only the log's last line counts, because the program hung there.
        cause: may name groups of the pattern in braces, `{means}` of the table's row, `{rest}`, what the line says
            after the pattern, and `{place}`, the part of a program that raised a Python exception.
        source: where the message was seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    role: Role
    pattern: str
    line: bool = False
    telling: bool = False
    certain: bool = False
    placed: bool = False
    table: str | None = None
    unless: str | None = None
    after: str | None = None
    unless_after: str | None = None
    last: bool = False
    cause: str
    hint: str
    source: str


@dataclass(frozen=True)
class Finding:
    """Lines of a log that show a failure.

    Attributes:
        number: of the first line, from 1.
        times: number of occurrences in the log.
    """

    id: str
    role: Role
    number: int
    line: str
    times: int
    cause: str
    hint: str


@dataclass(frozen=True)
class Explanation:
    """The explanation of a log.

    Attributes:
        findings: causes first, in the order of the log, warnings after errors; then symptoms, the specific ones
            first, then what follows.
        telling: lines that look like errors, with their numbers; for a log without a known cause.
    """

    findings: tuple[Finding, ...]
    telling: tuple[tuple[int, str], ...]

    @property
    def first(self) -> Finding | None:
        """The first cause, or the first symptom without a known cause."""
        return self.findings[0] if self.findings and self.findings[0].role in ("cause", "symptom") else None


def explain(lines: Iterable[str]) -> Explanation:
    """Search a log for known failures."""
    searches = [_Search(failure) for failure in failures()]
    log = Log(lines)
    for chunk in log.chunks():
        for search in searches:
            search.see(chunk)
    taken: set[int] = set()
    found: list[tuple[_Search, _Hit]] = []
    for search in searches:  # the entries stand from the specific to the general
        hits = [hit for hit in search.hits if not search.failure.last or hit.lines[-1].number == log.last]
        first = next((hit for hit in hits if not taken.intersection(hit.numbers)), None)
        if first is not None:
            found.append((search, first))
            for hit in hits:
                taken.update(hit.numbers)
    # Causes in the order of the log; the others stay in that of the file, from the specific to the general.
    found.sort(key=lambda entry: entry[1].rank)
    findings = tuple(
        Finding(
            search.failure.id,
            hit.role,
            hit.lines[0].number,
            hit.text,
            max(search.times, sum(log.counts[name] for name in {key(other.lines[0].text) for other in search.hits})),
            search.failure.cause.format_map(hit.groups),
            search.failure.hint.format_map(hit.groups),
        )
        for search, hit in found
    )
    known = bool(findings) and findings[0].role == "cause"
    return Explanation(findings, () if known else log.telling())


class _Groups(dict[str, str]):
    """The groups of a match. A group without text reads as its kind."""

    def __missing__(self, name: str) -> str:
        return f"it ({name})"


@dataclass(frozen=True)
class _Hit:
    """Lines that match; `text` joins them for display."""

    lines: tuple[Line, ...]
    text: str
    groups: _Groups
    role: Role
    warning: bool

    @property
    def numbers(self) -> set[int]:
        return {line.number for line in self.lines}

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Return the sort key among the findings."""
        cause = self.role == "cause"
        return _ROLES.index(self.role), self.warning, cause * self.lines[0].number


class _Search:
    """The search for one failure, chunk after chunk."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        self.hits: list[_Hit] = []
        self.times = 0
        self._after = _squeezing(failure.after) if failure.after else None
        self._end = _squeezing(failure.unless_after) if failure.unless_after else None
        self._ended = False

    def see(self, chunk: Chunk) -> None:
        if self._ended:
            return
        end = self._end.search(chunk.squeezed) if self._end is not None else None
        self._ended = end is not None and end.start() < chunk.end
        since = 0
        if self._after is not None:
            before = self._after.search(chunk.squeezed)
            if before is None:
                return
            since, self._after = chunk.starts[chunk.place(before.start(), before.end()).start] + 1, None
        for place, match in self._matches(chunk):
            lines = tuple(chunk.lines[place])
            if since and chunk.starts[place.start] < since:
                continue
            if end is not None and chunk.starts[place.start] > end.start():
                continue
            if self.failure.unless is not None and _squeezing(self.failure.unless).search(
                "".join(squeezed(line.text) for line in lines)
            ):
                continue
            hit = self._hit(chunk, place, match)
            if hit is None:
                continue
            self.times += 1
            if len(self.hits) < _HITS or self.failure.last:
                self.hits = [hit] if self.failure.last else [*self.hits, hit]

    def _matches(self, chunk: Chunk) -> Iterator[tuple[slice, re.Match[str]]]:
        pattern = _compiled(self.failure)
        tells = self.failure.certain or self.failure.last  # even where its program calls it information
        if self.failure.line:
            for index, line in enumerate(chunk.lines):
                if line.info and not tells:
                    continue
                if chunk.starts[index] >= chunk.end or (self.failure.telling and (line.sign is None or line.warning)):
                    continue
                if match := pattern.search(line.text):
                    yield slice(index, index + 1), match
            return
        seen, position = -1, 0
        while (match := pattern.search(chunk.squeezed, position)) and match.start() < chunk.end:
            lines = chunk.place(match.start(), match.end())
            if chunk.lines[lines.start].info and not tells:
                position = (
                    chunk.starts[lines.start + 1] if lines.start + 1 < len(chunk.starts) else len(chunk.squeezed)
                )
                continue
            position = max(match.end(), match.start() + 1)
            if lines.start > seen:
                seen = lines.stop - 1
                yield lines, match

    def _hit(self, chunk: Chunk, place: slice, match: re.Match[str]) -> _Hit | None:
        lines = tuple(chunk.lines[place])
        texts = [line.text for line in lines]
        caught = {name: text for name, text in match.groupdict().items() if text}
        if self.failure.line:
            caught.setdefault("what", _sentence(match))
        else:
            caught["rest"] = chunk.squeezed[match.end() : ([*chunk.starts, None])[place.stop]][: _QUOTED + 1]
            caught = {name: spaced(text, texts) for name, text in caught.items()}
        groups = _Groups(
            {"rest": "the line says what"} | {name: _quoted(text) for name, text in caught.items() if text}
        )
        role = self.failure.role
        warning = all(line.warning for line in lines) and not self.failure.certain
        if role == "cause" and warning:
            role = "symptom"  # what a program goes on after is no cause for certain
        if self.failure.table is not None:
            row = _rows(self.failure.table).get(_folded(groups["key"]))
            if row is None:
                return None
            groups.update(means=row.means, help=row.hint, name=row.keys[0])
            role = row.role or role
        part = _place(lines[0].frames)
        if self.failure.placed and part is None:
            return None
        groups["place"] = part or "a program"
        return _Hit(lines, shown(texts, match[0]), groups, role, warning)


def _sentence(match: re.Match[str]) -> str:
    """The part of a line around a match, from the last colon or quote before it."""
    begin = re.match(r'(?:.*[:"])?', match.string[: match.start()])
    return match.string[begin.end() if begin else 0 :]


def _quoted(text: str) -> str:
    return text.strip(" :") if len(text) <= _QUOTED else f"{text[:_QUOTED].strip(' :')}..."


def _place(frames: tuple[tuple[str, str], ...]) -> str | None:
    """The part of a program that a traceback leads to, and the innermost function there."""
    if any(function == "__del__" for _, function in frames):
        return None  # noise at the end of a program
    for path, function in reversed(frames):
        for row in tables()["places"]:
            if re.search(row.keys[0], path):
                return f"{row.means} ({path.lstrip('/')}, {function})"
    return None


def _squeezing(pattern: str) -> re.Pattern[str]:
    """A pattern for squeezed text: its spaces do not count, and `.*` stays near."""
    for spaces in (" *", " +", " ?", " "):
        pattern = pattern.replace(spaces, "")
    return re.compile(pattern.replace(".*", f".{{0,{_REACH}}}?"))


@cache
def _compiled(failure: Failure) -> re.Pattern[str]:
    pattern = failure.pattern
    if failure.table is not None and "KEYS" in pattern:
        keys = sorted((key for row in tables()[failure.table] for key in row.keys), key=len, reverse=True)
        pattern = pattern.replace("KEYS", "|".join(re.escape(key).replace("\\ ", " ") for key in keys))
    return re.compile(pattern) if failure.line else _squeezing(pattern)


def _folded(key: str) -> str:
    return "".join(key.split()).lower()


@cache
def _rows(table: str) -> dict[str, Row]:
    return {_folded(key): row for row in tables()[table] for key in row.keys}


@cache
def tables() -> dict[str, tuple[Row, ...]]:
    """The members of the kinds that have many, by the name of their table."""
    content: dict[str, Any] = json.loads(_TABLES.read_text(encoding="utf-8"))
    return {name: tuple(Row.model_validate(row) for row in table["rows"]) for name, table in content.items()}


@cache
def failures() -> tuple[Failure, ...]:
    """Every known failure, the specific ones before the general ones."""
    content: dict[str, Any] = json.loads(_FACTS.read_text(encoding="utf-8"))
    return tuple(Failure.model_validate(entry) for entry in content["failures"])

"""From a log to causes and hints, by the patterns in `failures.json`.

Logs reach us wrapped: Triton prints errors in a table, terminals and issue threads break lines within words, docker
and mpirun put a prefix before each. So a pattern is matched against the log without any white space, prefixes or
table borders, and may run over several lines.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

_FACTS = Path(__file__).with_name("failures.json")

Role = Literal["cause", "symptom", "echo", "note"]
_ROLES: tuple[Role, ...] = ("cause", "symptom", "echo", "note")
_CHUNK, _OVERLAP = 4000, 12  # lines searched at a time, and lines that a match may run on into
_REACH = 240  # characters, without white space, that `.*` spans at most
_LONGEST = 400  # characters of a line that is shown
_TELLING = 5  # lines shown of a log that is not understood
_GAP = 3  # empty lines and table borders that a match may run over
_REPEATS = 20  # lines that are searched of those that differ in numbers alone; the others are counted

_ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07)")
_PREFIX = re.compile(
    r"^(?:\[\d+,\d+\]<std(?:err|out)>:\s?|[\w.-]+-\d+\s+\|\s|> ?"
    r"|\w{3} +\d+ [\d:]{8} \S+ \S+\[\d+\]: |\d{4}-\d\d-\d\dT[\d:.]+Z (?:stdout|stderr) [FP] )"
)
_BORDER = re.compile(r"^[+|][-=+]+[+|]?$")
_ESCAPED = re.compile(r'\\+(?:[ntr]|(?=["\']))')
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")

# Lines that tell of an error in a log that is not understood, the most telling first.
_SIGNS = tuple(
    re.compile(sign)
    for sign in (
        r"Assertion failed|what\(\):|^\w*(?:\.\w+)*(?:Error|Exception)\b.*:|\]\s*\[?E(?:RROR)?\]|\[ERROR\]",
        r"UNAVAILABLE: |failed to load '|^E\d{4} |NCCL WARN|\bFATAL\b|[Cc][Uu][Dd][Aa] ?(?:[Ee]rror|failure|runtime)",
        r"^(?:[\w./-]+: )?(?:fatal )?[Ee]rror:|Traceback \(most recent|Aborted|core dumped|terminate called|Signal: ",
    )
)


class Failure(BaseModel):
    """One known failure.

    Attributes:
        id: a short, stable name.
        role: `cause` ends the search; a `symptom` says where to look; an `echo` follows from an earlier error; a
            `note` is harmless by itself.
        pattern: regular expression; white space in it and in the log does not count.
        line: match single lines, with their white space, instead.
        unless: regular expression; a line that matches it too is not meant.
        after: regular expression that an earlier line must match.
        last: whether only the log's last line counts: the program hung there.
        cause: may name groups of the pattern in braces.
        source: where the message was seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    role: Role
    pattern: str
    line: bool = False
    unless: str | None = None
    after: str | None = None
    last: bool = False
    cause: str
    hint: str
    source: str


@dataclass(frozen=True)
class Finding:
    """Lines of a log that tell what went wrong.

    Attributes:
        number: of the first line, from 1.
        times: how often the log says the same.
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
    """What a log tells.

    Attributes:
        findings: causes first, in the order of the log; then symptoms, the specific ones first, then what follows.
        telling: lines that speak of errors, with their numbers; for a log without a known cause.
    """

    findings: tuple[Finding, ...]
    telling: tuple[tuple[int, str], ...]

    @property
    def first(self) -> Finding | None:
        """The first cause, or the first symptom where no cause is known."""
        return self.findings[0] if self.findings and self.findings[0].role in ("cause", "symptom") else None


def explain(lines: Iterable[str]) -> Explanation:
    """Search a log for known failures."""
    searches = [_Search(failure) for failure in failures()]
    log = _Log(lines)
    for chunk in log.chunks():
        for search in searches:
            search.see(chunk)
    taken: set[int] = set()
    found: list[tuple[int, _Search, _Hit]] = []
    for search in searches:  # the entries stand from the specific to the general
        hits = [hit for hit in search.hits if not search.failure.last or hit.numbers[-1] == log.last]
        first = next((hit for hit in hits if not taken.intersection(hit.numbers)), None)
        if first is not None:
            found.append((first.numbers[0], search, first))
            for hit in hits:
                taken.update(hit.numbers)
    # Causes in the order of the log; the others stay in that of the file, from the specific to the general.
    found.sort(key=lambda entry: (_ROLES.index(entry[1].failure.role), entry[0] * (entry[1].failure.role == "cause")))
    findings = tuple(
        Finding(
            search.failure.id,
            search.failure.role,
            number,
            hit.text,
            max(search.times, sum(log.counts[key] for key in {_key(hit.first) for hit in search.hits})),
            _filled(search.failure.cause, hit.groups),
            _filled(search.failure.hint, hit.groups),
        )
        for number, search, hit in found
    )
    known = bool(findings) and findings[0].role == "cause"
    return Explanation(findings, () if known else log.telling.lines())


@dataclass(frozen=True)
class _Hit:
    """Lines that match.

    Attributes:
        first: the first of them.
        text: all of them, for people.
    """

    numbers: tuple[int, ...]
    first: str
    text: str
    groups: dict[str, str]


@dataclass
class _Chunk:
    """Some lines of a log; matches have to begin before `end`.

    Attributes:
        squeezed: the lines without white space, joined; `starts` says where each begins.
    """

    numbers: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    squeezed: str = ""
    end: int = 0

    def place(self, start: int, end: int) -> slice:
        """The lines that hold these characters of `squeezed`."""
        return slice(bisect_right(self.starts, start) - 1, bisect_right(self.starts, max(start, end - 1)))


class _Search:
    """One failure, looked for in one chunk after the other."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        self.hits: list[_Hit] = []
        self.times = 0
        self._pattern = re.compile(failure.pattern) if failure.line else _squeezing(failure.pattern)
        self._unless = _squeezing(failure.unless) if failure.unless else None
        self._after = _squeezing(failure.after) if failure.after else None

    def see(self, chunk: _Chunk) -> None:
        since = 0
        if self._after is not None:
            before = self._after.search(chunk.squeezed)
            if before is None:
                return
            since, self._after = chunk.starts[chunk.place(before.start(), before.end()).start] + 1, None
        for lines, match in self._matches(chunk):
            start = chunk.starts[lines.start]
            if since and start < since:
                continue
            if self._unless is not None and self._unless.search("".join(map(_squeezed, chunk.lines[lines]))):
                continue
            self.times += 1
            if len(self.hits) < 100 or self.failure.last:
                groups = {name: text for name, text in match.groupdict().items() if text}
                found = chunk.lines[lines]
                hit = _Hit(tuple(chunk.numbers[lines]), found[0], _shown(found, match[0]), groups)
                self.hits = [hit] if self.failure.last else [*self.hits, hit]

    def _matches(self, chunk: _Chunk) -> Iterator[tuple[slice, re.Match[str]]]:
        if self.failure.line:
            for index, line in enumerate(chunk.lines):
                if chunk.starts[index] < chunk.end and (match := self._pattern.search(line)):
                    yield slice(index, index + 1), match
            return
        seen = -1
        for match in self._pattern.finditer(chunk.squeezed):
            if match.start() >= chunk.end:
                return
            lines = chunk.place(match.start(), match.end())
            if lines.start > seen:
                seen = lines.stop - 1
                yield lines, match


class _Telling:
    """The lines that look most like errors."""

    def __init__(self) -> None:
        self._found: list[list[tuple[int, str]]] = [[] for _ in _SIGNS]
        self._last: tuple[int, str] | None = None

    def see(self, number: int, line: str) -> None:
        self._last = (number, line)
        for sign, found in zip(_SIGNS, self._found, strict=True):
            if len(found) < _TELLING and sign.search(line):
                found.append((number, line))
                return

    def lines(self) -> tuple[tuple[int, str], ...]:
        chosen = [entry for found in self._found for entry in found][:_TELLING]
        if not chosen and self._last is not None:
            chosen = [self._last]
        return tuple((number, _cut(line)) for number, line in sorted(chosen))


class _Log:
    """A log that is read once, in pieces.

    Attributes:
        counts: how often each line occurs, numbers in it aside.
        last: number of the last line that is not empty.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.counts: Counter[str] = Counter()
        self.telling = _Telling()
        self.last = 0

    def chunks(self) -> Iterator[_Chunk]:
        """The pieces overlap, so that a match may run over their border."""
        waiting: deque[tuple[int, str]] = deque()
        repeated: tuple[int, str] | None = None
        for number, raw in enumerate(self._lines, 1):
            line = _clean(raw)
            if not line:
                continue
            self.last, key, repeated = number, _key(line), None
            self.counts[key] += 1
            if self.counts[key] > _REPEATS:
                repeated = number, line
                continue
            waiting.append((number, line))
            self.telling.see(number, line)
            if len(waiting) == _CHUNK + _OVERLAP:
                yield _chunk(waiting, _CHUNK)
                for _ in range(_CHUNK):
                    waiting.popleft()
        if repeated is not None:
            waiting.append(repeated)  # the last line may tell of a hang
        if waiting:
            yield _chunk(waiting, len(waiting))


def _chunk(entries: Iterable[tuple[int, str]], count: int) -> _Chunk:
    """A chunk in which matches begin in the first `count` lines."""
    chunk, length, texts, expected = _Chunk(), 0, [], 0
    for index, (number, line) in enumerate(entries):
        if index == count:
            chunk.end = length
        text = _squeezed(line)
        if (
            expected and number > expected + _GAP
        ):  # `.` does not match a line's end: matches stay where lines are near
            texts.append("\n")
            length += 1
        expected = number + 1
        chunk.numbers.append(number)
        chunk.lines.append(line)
        chunk.starts.append(length)
        texts.append(text)
        length += len(text)
    chunk.squeezed = "".join(texts)
    chunk.end = chunk.end or max(1, length)
    return chunk


def _key(line: str) -> str:
    return _NUMBER.sub("#", line)


def _clean(raw: str) -> str:
    """A line without colors, prefixes of launchers, table borders and white space at its ends."""
    line = _PREFIX.sub("", _ANSI.sub("", raw)).strip()
    if line.startswith(("|", "+")):
        if _BORDER.match(line):
            return ""
        line = " ".join(cell.strip() for cell in line.split("|")).strip()
    return line


def _squeezed(line: str) -> str:
    return _SPACE.sub("", _ESCAPED.sub("", line))


def _squeezing(pattern: str) -> re.Pattern[str]:
    """A pattern for squeezed text: its spaces do not count, and `.*` stays near."""
    return re.compile(
        pattern.replace(" *", "")
        .replace(" +", "")
        .replace(" ?", "")
        .replace(" ", "")
        .replace(".*", f".{{0,{_REACH}}}?")
    )


def _shown(lines: list[str], match: str) -> str:
    """The lines of a hit as one; of a long one the part around the match."""
    text = _SPACE.sub(" ", " ".join(lines))
    if len(text) <= _LONGEST:
        return text
    place = text.find(match[:12])
    begin = max(0, min(place - _LONGEST // 3, len(text) - _LONGEST)) if place > _LONGEST // 2 else 0
    return ("..." if begin else "") + text[begin : begin + _LONGEST] + ("..." if begin + _LONGEST < len(text) else "")


def _cut(line: str) -> str:
    text = _SPACE.sub(" ", line)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


class _Groups(dict[str, str]):
    """What a pattern caught; a group without text reads as the kind of thing it is."""

    def __missing__(self, name: str) -> str:
        return f"it ({name})"


def _filled(text: str, groups: dict[str, str]) -> str:
    return text.format_map(_Groups(groups)) if "{" in text else text


@cache
def failures() -> tuple[Failure, ...]:
    """Every known failure, the specific ones before the general ones."""
    content: dict[str, Any] = json.loads(_FACTS.read_text(encoding="utf-8"))
    return tuple(Failure.model_validate(entry) for entry in content["failures"])

"""Logs of programs, cut into chunks for the search.

Log lines are often wrapped: Triton prints errors in a table, terminals and issue threads break lines within words,
and docker and mpirun add prefixes. A chunk therefore holds its lines without prefixes and table borders, and also one
text without any white space, in which a match can extend over several lines.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_CHUNK, _OVERLAP = 4000, 12  # lines searched at a time, and lines that a match may run on into
_TELLING = 5  # lines shown of a log that is not understood
_GAP = 3  # empty lines and table borders that a match may run over
_REPEATS = 20  # lines that are searched of those that differ in numbers alone; the others are counted
_FRAMES = 1000  # of a traceback that are kept, the limit of a recursion
_LONGEST = 400  # characters of a line that is shown

_ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07)")
_PREFIX = re.compile(
    r"^(?:\[\d+,\d+\]<std(?:err|out)>:\s?|[\w.-]+-\d+\s+\|\s|> ?"
    r"|\w{3} +\d+ [\d:]{8} \S+ \S+\[\d+\]: |\d{4}-\d\d-\d\dT[\d:.]+Z (?:stdout|stderr) [FP] )"
)
_BORDER = re.compile(r"^[+|][-=+]+[+|]?$")
_ESCAPED = re.compile(r'\\+(?:[ntr]|(?=["\']))')
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")
_WARNING = re.compile(r"^W\d{4} |\[(?:W|WARNING)\]|^(?:\([^)]*\) )?(?:DEBUG|INFO|WARNING) \d\d-\d\d |Warning: ")
_INFO = re.compile(
    r"^(?!.*\[(?:E|ERROR)\])(?:.*(?:\[(?:I|INFO|V|VERBOSE|D|DEBUG|TRACE)\]|\bNCCL INFO )"
    r"|(?:\([^)]*\) )?(?:DEBUG|INFO) \d\d-\d\d |\d{4}-\d\d-\d\d[T ][\d:.,]+Z?\s+(?:- )?(?:DEBUG|INFO)\b)"
)
_FRAME = re.compile(
    r'File \\*"(?:[^"]*/(?:site|dist)-packages/)?(?P<path>[^"\\]+)\\*", line \d+, in (?P<function>[\w<>]+)'
)
_RAISE = re.compile(r"(?:^|\] +)raise \w")

# Lines that tell of an error in a log that is not understood, the most telling first.
_SIGNS = tuple(
    re.compile(sign)
    for sign in (
        r"Assertion failed|what\(\):|(?:^|[\] ])(?:\w+\.)*\w*(?:Error|Exception|StopIteration)(?:\b.*:|$)"
        r"|\]\s*\[?E(?:RROR)?\]|\[ERROR\]",
        r"UNAVAILABLE: |failed to load '|^E\d{4} |NCCL WARN|\bFATAL\b|[Cc][Uu][Dd][Aa] ?(?:[Ee]rror|failure|runtime)"
        r"|message: |[\"']error[\"']:",
        r"^(?:[\w./-]+: )?(?:fatal )?(?:[Ee]rror|ERROR): |Traceback \(most recent|Aborted|core dumped"
        r"|terminate called|Signal: |^(?:\([^)]*\) )?ERROR ",
        r"^(?!.*(?:^I\d{4} |\[(?:I|INFO|W|WARNING|V|VERBOSE|DEBUG)\]|\b(?:INFO|DEBUG|WARNING|VERBOSE)\b|[Ww]arning))"
        r".*\b(?:[Ff]ail(?:ed|ure|s)\b"
        r"|(?i:error|assert|exception|fatal)|[Cc](?:annot|ould not)|[Uu]nable|[Ii]nvalid)",
    )
)


@dataclass(frozen=True)
class Line:
    """A line without colors, prefixes of launchers, table borders and white space at its ends.

    Attributes:
        number: from 1.
        sign: how strongly it looks like an error, 0 the most; None if it does not.
        warning: whether the program that wrote it calls it a warning or less.
        info: whether that program calls it information, so that it is not a failure.
        frames: path and function of the stack frames of a Python traceback before it, the innermost last.
    """

    number: int
    text: str
    sign: int | None
    warning: bool
    info: bool = False
    frames: tuple[tuple[str, str], ...] = ()


@dataclass
class Chunk:
    """Some lines of a log; matches have to begin before `end`.

    Attributes:
        squeezed: the lines without white space, joined; `starts` says where each begins.
    """

    lines: list[Line] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    squeezed: str = ""
    end: int = 0

    def place(self, start: int, end: int) -> slice:
        """The lines that hold these characters of `squeezed`."""
        return slice(bisect_right(self.starts, start) - 1, bisect_right(self.starts, max(start, end - 1)))


class Log:
    """A log that is read once, in chunks.

    Attributes:
        counts: how often each line occurs, numbers in it aside.
        last: number of the last line that is not empty.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self._frames: deque[tuple[str, str]] = deque(maxlen=_FRAMES)
        self._telling: list[list[Line]] = [[] for _ in _SIGNS]
        self._shown: Line | None = None
        self.counts: Counter[str] = Counter()
        self.last = 0

    def chunks(self) -> Iterator[Chunk]:
        """The pieces overlap, so that a match may run over their border."""
        waiting: deque[Line] = deque()
        repeated: Line | None = None
        for number, raw in enumerate(self._lines, 1):
            text = _clean(raw)
            if not text:
                continue
            self.last, name, repeated = number, key(text), None
            self.counts[name] += 1
            if self.counts[name] > _REPEATS and 'File "' not in text:
                repeated = Line(number, text, None, False)
                continue
            line = self._read(number, text)
            waiting.append(line)
            if len(waiting) == _CHUNK + _OVERLAP:
                yield _chunk(waiting, _CHUNK)
                for _ in range(_CHUNK):
                    waiting.popleft()
        if repeated is not None:
            waiting.append(repeated)  # the last line may tell of a hang
        if waiting:
            yield _chunk(waiting, len(waiting))

    def telling(self) -> tuple[tuple[int, str], ...]:
        """Number and text of the lines that look most like errors."""
        chosen = [line for lines in self._telling for line in lines][:_TELLING]
        if not chosen and self._shown is not None:
            chosen = [self._shown]
        return tuple((line.number, cut(line.text)) for line in sorted(chosen, key=lambda line: line.number))

    def _read(self, number: int, text: str) -> Line:
        if "Traceback (most recent call last)" in text:
            self._frames.clear()
        frames = list(_FRAME.finditer(text)) if "File " in text else []
        self._frames.extend((match["path"], match["function"]) for match in frames)
        source = (len(frames) == 1 and frames[0].end() == len(text)) or _RAISE.search(text)  # not what happened
        sign = None if source else next((rank for rank, pattern in enumerate(_SIGNS) if pattern.search(text)), None)
        warning = _WARNING.search(text) is not None
        info = _INFO.search(text) is not None
        line = Line(number, text, sign, warning, info, tuple(self._frames) if sign is not None else ())
        self._shown = line
        if sign is not None and len(self._telling[sign]) < _TELLING:
            self._telling[sign].append(line)
        return line


def _chunk(lines: Iterable[Line], count: int) -> Chunk:
    """A chunk in which matches begin in the first `count` lines."""
    chunk, length, texts, expected = Chunk(), 0, [], 0
    for index, line in enumerate(lines):
        if index == count:
            chunk.end = length
        text = squeezed(line.text)
        if expected and line.number > expected + _GAP:
            texts.append("\n")  # `.` does not match a line's end: matches stay where lines are near
            length += 1
        expected = line.number + 1
        chunk.lines.append(line)
        chunk.starts.append(length)
        texts.append(text)
        length += len(text)
    chunk.squeezed = "".join(texts)
    chunk.end = chunk.end or max(1, length)
    return chunk


def _clean(raw: str) -> str:
    line = _PREFIX.sub("", _ANSI.sub("", raw)).strip()
    if line.startswith(("|", "+")):
        if _BORDER.match(line):
            return ""
        line = " ".join(cell.strip() for cell in line.split("|")).strip()
    return line


def key(line: str) -> str:
    """Return a key that is equal for lines which differ only in numbers."""
    return _NUMBER.sub("#", line)


def squeezed(line: str) -> str:
    """A line without white space and escapes."""
    return _SPACE.sub("", _ESCAPED.sub("", line))


def spaced(text: str, lines: Iterable[str]) -> str:
    """A part of squeezed text with the spaces that it had in these lines."""
    whole = " ".join(lines)
    match = re.search(r"(?:\s|\\+[ntr]?)*".join(map(re.escape, text)), whole)
    return _SPACE.sub(" ", _ESCAPED.sub(" ", match[0])).strip() if match else text


def shown(lines: Iterable[str], match: str) -> str:
    """The lines of a match as one; of a long one the part around the match."""
    text = _SPACE.sub(" ", " ".join(lines))
    if len(text) <= _LONGEST:
        return text
    place = text.find(match[:12])
    begin = max(0, min(place - _LONGEST // 3, len(text) - _LONGEST)) if place > _LONGEST // 2 else 0
    return ("..." if begin else "") + text[begin : begin + _LONGEST] + ("..." if begin + _LONGEST < len(text) else "")


def cut(line: str) -> str:
    """A line that is not too long to be shown."""
    text = _SPACE.sub(" ", line)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."

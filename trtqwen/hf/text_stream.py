"""Streams of token ids as text: only whole characters, up to the first stop string.

Byte-level BPE splits a Chinese character or an emoji over several tokens; if decoded separately, they give U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes a stream of token ids. The joined pieces equal the tokenizer's decoding of all ids.

    Args:
        token_bytes: what each id stands for; ids beyond it, a model's padding rows, stand for nothing.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        known = len(self._token_bytes)
        if len(ids) == 1 and 0 <= ids[0] < known:
            return self._decoder.decode(self._token_bytes[ids[0]])
        return self._decoder.decode(b"".join(self._token_bytes[i] for i in ids if 0 <= i < known))

    @property
    def inside_character(self) -> bool:
        """Whether the ids so far end in the middle of a character."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """Return the incomplete last character, at the end of the stream."""
        return self._decoder.decode(b"", True)


class CharacterStream:
    """Cuts a stream of token ids where characters end, so that each piece decodes on its own."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._text = TextStream(token_bytes)
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> list[int]:
        """Take new ids; return those, older ones first, that now end at a character's end."""
        ready: list[int] = []
        for token_id in ids:
            self._held.append(token_id)
            self._text.push((token_id,))
            if not self._text.inside_character:
                ready += self._held
                self._held = []
        return ready

    def flush(self) -> list[int]:
        """The ids still held, for the end of the stream."""
        held, self._held = self._held, []
        return held


class StopStrings:
    """Ends a stream of text at the first of some strings.

    The string that is complete first counts, regardless of the pieces.

    Args:
        keep: the text ends with the string; otherwise before it, and what may be the beginning of one is held back.

    Attributes:
        found: the string that ended the text.
    """

    def __init__(self, strings: Sequence[str], *, keep: bool = False) -> None:
        self._strings = tuple(strings)
        self._keep = keep
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""  # not returned yet, or with `keep` returned already
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take new text; return what is certain to belong to the text."""
        if not self._strings or self.found is not None:
            return "" if self.found is not None else text
        before = len(self._held) if self._keep else 0
        text = self._held + text
        starts = [(start, string) for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            start, self.found = min(starts, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[before : start + len(self.found) if self._keep else start]
        if self._keep:
            self._held = text[max(0, len(text) - self._longest + 1) :]
            return text[before:]
        hold = max(held_back(text, string) for string in self._strings)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """The text still held, for the end of the stream."""
        held, self._held = self._held, ""
        return "" if self._keep else held


def held_back(text: str, string: str) -> int:
    """How many characters at the end of `text` may be the beginning of `string`."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0

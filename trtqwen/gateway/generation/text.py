"""From a stream of token ids to a stream of text: whole characters only, cut at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes token ids as they come. The pieces, joined, equal the tokenizer's decoding of all ids at once.

    Byte-level BPE splits a Chinese character or an emoji over several tokens: bytes wait until a character is whole.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        known = len(self._token_bytes)  # models have padding rows beyond the tokenizer
        return self._decoder.decode(b"".join(self._token_bytes[i] for i in ids if 0 <= i < known))

    def flush(self) -> str:
        """What is left of the last character, for the end of the stream."""
        return self._decoder.decode(b"", True)


class StopStrings:
    """Finds the first of some strings in a stream of text and holds back what may be the beginning of one.

    Attributes:
        found: the string that ended the text, which is not part of it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take new text; return what is certain to be before any stop string."""
        if not self._strings or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        starts = [(start, string) for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            # As if the text had come character by character: the string that is complete first counts.
            start, self.found = min(starts, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[:start]
        hold = max(held_back(text, string) for string in self._strings)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """The text still held, for the end of the stream."""
        held, self._held = self._held, ""
        return held


def held_back(text: str, string: str) -> int:
    """How many characters at the end of `text` may be the beginning of `string`."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0

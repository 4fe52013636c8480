"""Reasoning of a model, between `<think>` and `</think>`, separated from its answer while both stream."""

from __future__ import annotations

from typing import NamedTuple

from trtqwen.hf.text_stream import held_back

BEGIN = "<think>"
END = "</think>"


class Reasoning(NamedTuple):
    """Part of a model's reasoning."""

    text: str


class ReasoningParser:
    """Parses an answer's text piece by piece. The joined result does not depend on the pieces.

    An answer that does not begin with `<think>` is an answer throughout. White space around the reasoning, and
    before the answer after it, is dropped.

    Args:
        inside: the prompt has already opened the block.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._decided = inside
        self._begun = False  # something was thought
        self._text = ""
        self._answer = False
        self._skip = False  # white space in front of the answer

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return its reasoning and its answer parts."""
        if self._answer and not self._skip:
            return "", text
        self._text += text
        if not self._decided:
            beginning = self._text.lstrip()
            if beginning.startswith(BEGIN):
                self._decided = self._inside = True
                self._text = beginning[len(BEGIN) :]
            elif BEGIN.startswith(beginning):
                return "", ""
            else:
                self._decided = self._answer = True
        thought = self._thought() if self._inside else ""
        return thought, self._rest() if self._answer else ""

    def flush(self) -> tuple[str, str]:
        """What is left at the end of the answer; a tag that is cut off belongs to neither."""
        rest, self._text = self._text, ""
        if self._inside:
            held = held_back(rest, END)
            return rest[: len(rest) - held].rstrip(), ""
        return "", "" if self._skip else rest

    def _thought(self) -> str:
        if not self._begun:
            self._text = self._text.lstrip()
        end = self._text.find(END)
        if end >= 0:
            thought, self._text = self._text[:end].rstrip(), self._text[end + len(END) :]
            self._inside, self._answer, self._skip = False, True, True
            return thought
        sure = self._text[: len(self._text) - held_back(self._text, END)].rstrip()
        self._text = self._text[len(sure) :]
        self._begun = self._begun or bool(sure)
        return sure

    def _rest(self) -> str:
        rest, self._text = self._text, ""
        if self._skip:
            rest = rest.lstrip()
            self._skip = not rest
        return rest

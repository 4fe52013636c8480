"""Checks and their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from trtqwen.diagnostics import Diagnostic, Level
from trtqwen.doctor.subject import Subject

Verdict = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Result:
    """The result of a check. Evidence and hint have one line per problem; a skip has its reason as evidence."""

    verdict: Verdict
    evidence: str
    hint: str = ""


class Check(ABC):
    """One check. A new one is a subclass, named in its module's CHECKS.

    Attributes:
        level: `error` if a problem fails the command, `warning` if not.
        place: `host` for checks that run only outside of containers.
    """

    id: ClassVar[str]
    level: ClassVar[Level]
    title: ClassVar[str]
    place: ClassVar[Literal["any", "host"]] = "any"

    @abstractmethod
    def run(self, subject: Subject) -> Result:
        """Check the subject.

        Raises:
            Skip: if there is nothing to check.
            TrtQwenError: for a problem.
        """

    def judge(self, problems: Sequence[Diagnostic], evidence: str = "") -> Result:
        """Return `ok` with the evidence if there are no problems; otherwise the problems."""
        if not problems:
            return Result("ok", evidence)
        fails = self.level == "error" and any(problem.level == "error" for problem in problems)
        hints = dict.fromkeys(problem.hint for problem in problems)
        return Result("fail" if fails else "warn", "\n".join(problem.what for problem in problems), "\n".join(hints))

    def found(self, text: str, hint: str, level: Level = "error") -> Result:
        """Return the result of one problem."""
        return self.judge([Diagnostic(text, hint, level)])

"""What a check is and what it answers."""

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
    """What a check found. Evidence and hint have a line for each problem; the evidence of a skip is its reason."""

    verdict: Verdict
    evidence: str
    hint: str = ""


class Check(ABC):
    """One check. A new one is a subclass, named in its module's CHECKS.

    Attributes:
        level: the worst it can say: an error fails, a warning warns.
        place: `host` for what is looked at outside of containers only.
    """

    id: ClassVar[str]
    level: ClassVar[Level]
    title: ClassVar[str]
    place: ClassVar[Literal["any", "host"]] = "any"

    @abstractmethod
    def run(self, subject: Subject) -> Result:
        """Look at the subject.

        Raises:
            Skip: if there is nothing to look at.
            TrtQwenError: a problem, as its own sentence.
        """

    def judge(self, problems: Sequence[Diagnostic], evidence: str = "") -> Result:
        """Ok with the evidence where there are no problems; else the problems in its place."""
        if not problems:
            return Result("ok", evidence)
        fails = self.level == "error" and any(problem.level == "error" for problem in problems)
        hints = dict.fromkeys(problem.hint for problem in problems)
        return Result("fail" if fails else "warn", "\n".join(problem.what for problem in problems), "\n".join(hints))

    def found(self, text: str, hint: str, level: Level = "error") -> Result:
        """The result of one problem."""
        return self.judge([Diagnostic(text, hint, level)])

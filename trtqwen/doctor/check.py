"""What a check is and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from trtqwen.doctor.subject import Subject
from trtqwen.errors import TrtQwenError

Level = Literal["error", "warning"]
Verdict = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        level: a warning does not make a check fail, whatever the check's own level.
    """

    text: str
    remedy: str
    level: Level = "error"


@dataclass(frozen=True)
class Result:
    """What a check found. Evidence and remedy have a line for each problem; the evidence of a skip is its reason."""

    verdict: Verdict
    evidence: str
    remedy: str = ""


class Check(ABC):
    """One check. A new one is a subclass, named in its module's CHECKS.

    Attributes:
        level: the worst it can say: an error fails, a warning warns.
    """

    id: ClassVar[str]
    level: ClassVar[Level]
    title: ClassVar[str]

    @abstractmethod
    def run(self, subject: Subject) -> Result:
        """Look at the subject.

        Raises:
            Skip: if there is nothing to look at.
            TrtQwenError: a problem, as its own sentence.
        """

    def judge(self, problems: Sequence[Problem], evidence: str = "") -> Result:
        """Ok with the evidence where there are no problems; else the problems in its place."""
        if not problems:
            return Result("ok", evidence)
        fails = self.level == "error" and any(problem.level == "error" for problem in problems)
        remedies = dict.fromkeys(problem.remedy for problem in problems)
        return Result(
            "fail" if fails else "warn", "\n".join(problem.text for problem in problems), "\n".join(remedies)
        )

    def found(self, text: str, remedy: str, level: Level = "error") -> Result:
        """The result of one problem."""
        return self.judge([Problem(text, remedy, level)])


def as_problem(error: TrtQwenError) -> Problem:
    """An error's sentence, whose remedy stands behind its last semicolon."""
    text, separator, remedy = str(error).rpartition("; ")
    return Problem(text, remedy) if separator else Problem(remedy, "")

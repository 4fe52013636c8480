"""Runs every check on a subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trtqwen.diagnostics import TrtQwenError
from trtqwen.doctor import engine, files, gpu, live, machine, model, parity, recipe, repository, software
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject

_MODULES = (software, machine, model, recipe, engine, repository, files, gpu, live, parity)
CHECKS: tuple[Check, ...] = tuple(
    sorted((check for module in _MODULES for check in module.CHECKS), key=lambda check: check.id)
)


@dataclass(frozen=True)
class Finding:
    """A check and what it found."""

    check: Check
    result: Result

    def as_json(self) -> dict[str, Any]:
        check, result = self.check, self.result
        return {
            "id": check.id,
            "level": check.level,
            "title": check.title,
            "verdict": result.verdict,
            "evidence": result.evidence,
            "hint": result.hint,
        }


def examine(subject: Subject, started: Callable[[Check], None] = lambda check: None) -> Iterator[Finding]:
    """Every check's finding, in the order of their ids.

    Args:
        started: called before each check; some take seconds.
    """
    for check in CHECKS:
        started(check)
        yield Finding(check, run_check(check, subject))


def run_check(check: Check, subject: Subject) -> Result:
    """What a check says; a skip and an error are answers too."""
    try:
        return check.run(subject)
    except Skip as reason:
        return Result("skip", str(reason))
    except TrtQwenError as problem:
        return check.judge([problem.diagnostic])
    except OSError as problem:
        where = problem.filename or "this host"
        return check.found(f"{where}: {problem.strerror or problem}", "look at its permissions")

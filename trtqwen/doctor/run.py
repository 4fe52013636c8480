"""Runs every check on a subject."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trtqwen.containers.docker import prepared
from trtqwen.containers.plan import ContainerPlan
from trtqwen.diagnostics import ContainerError, TrtQwenError
from trtqwen.doctor import (
    cards,
    docker,
    embedded,
    engine,
    files,
    gpu,
    live,
    machine,
    model,
    parity,
    recipe,
    repository,
    software,
)
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.engine.explain import explain

_MODULES = (software, machine, model, recipe, engine, repository, files, gpu, live, parity, docker, cards, embedded)
CHECKS: tuple[Check, ...] = tuple(
    sorted((check for module in _MODULES for check in module.CHECKS), key=lambda check: check.id)
)


@dataclass(frozen=True)
class Finding:
    """A check and its result."""

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
    """Run every check, in the order of their ids.

    Args:
        started: called before each check; some take seconds.
    """
    for check in CHECKS:
        started(check)
        yield Finding(check, run_check(check, subject))


def run_check(check: Check, subject: Subject) -> Result:
    """Run a check. Skips and errors become results, errors of the check itself too: the others still run."""
    if check.place == "host" and subject.host.image is not None:
        return Result("skip", "a check of the host, outside of the container")
    try:
        return check.run(subject)
    except Skip as reason:
        return Result("skip", str(reason))
    except TrtQwenError as problem:
        return check.judge([problem.diagnostic])
    except OSError as problem:
        where = problem.filename or "this host"
        return check.found(f"{where}: {problem.strerror or problem}", "check its permissions")
    except Exception as problem:  # a value that no check expects, on a machine of a new kind
        what = f"the check itself failed ({type(problem).__name__}: {problem})"
        return Result("warn", what, "run `trtqwen report` and attach its file to an issue")


def examine_in_container(plan: ContainerPlan, subject: Subject) -> list[Finding]:
    """Run the host's checks here, and all others inside the container of `plan`.

    Args:
        subject: this host, with what was named.

    Raises:
        ContainerError: if docker does not answer, or the container does not run.
    """
    plan = prepared(plan)
    process = subprocess.run(plan.command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        inside = {entry["id"]: entry for entry in json.loads(process.stdout)["checks"]}
    except (ValueError, KeyError, TypeError):
        explanation = explain((process.stderr + process.stdout).splitlines())
        first = explanation.first
        lines = "; ".join(line for _, line in explanation.telling[:2])
        raise ContainerError(
            f"the container ended with exit code {process.returncode}: {first.cause if first else lines}",
            first.hint if first else "run it by hand: --dry-run prints the command",
        ) from None
    findings = []
    for check in CHECKS:
        entry = inside.get(check.id)
        if check.place == "host" or entry is None:
            findings.append(Finding(check, run_check(check, subject)))
        else:
            findings.append(Finding(check, Result(entry["verdict"], entry["evidence"], entry["hint"])))
    return findings

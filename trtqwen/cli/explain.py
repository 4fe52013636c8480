"""`trtqwen explain`: explain errors in a log of TensorRT-LLM, Triton, MPI, NCCL or docker."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import Json, print_json, stdout
from trtqwen.diagnostics import InputError
from trtqwen.engine.explain import Explanation, Finding, explain


def command(
    log: Annotated[Path, typer.Argument(help="Read this log file; - is standard input.")],
    json: Json = False,
) -> None:
    """Explain a failure log of trtllm-build, Triton, MPI, NCCL or docker: relevant lines, cause and hint.

    The first cause in the log comes first. Errors that follow from it are left out. If no cause is known, print the
    lines that look like errors; the exit code is then 1.
    """
    name = "standard input" if str(log) == "-" else str(log)
    try:
        with nullcontext(sys.stdin) if str(log) == "-" else log.open(encoding="utf-8", errors="replace") as lines:
            explanation = explain(lines)
    except OSError as problem:
        raise InputError(
            f"{log}: cannot be read ({problem.strerror})", "name a log file, or - for standard input"
        ) from None
    if json:
        telling = [{"number": number, "line": line} for number, line in explanation.telling]
        findings = [asdict(finding) for finding in explanation.findings]
        print_json({"log": name, "findings": findings, "telling": telling})
    else:
        _print(name, explanation)
    if explanation.first is None:
        raise typer.Exit(1)


def _print(name: str, explanation: Explanation) -> None:
    first = explanation.first
    if first is None:
        _say(f"{name}: the cause is not known to trtqwen")
        for number, line in explanation.telling:
            _say(f"  line {number}: {line}")
        for finding in explanation.findings:
            _print_finding(finding)
        return
    if first.role != "cause":
        _say(f"{name}: no line names the cause for certain; these say where to look")
    shown = [finding for finding in explanation.findings if finding.role == first.role]
    for finding in shown:
        _print_finding(finding)
    for number, line in explanation.telling:
        if number not in {finding.number for finding in shown}:
            _say(f"line {number}: {line}")


def _print_finding(finding: Finding) -> None:
    more = f" (and {finding.times - 1} more like it)" if finding.times > 1 else ""
    _say(f"line {finding.number}: {finding.line}{more}", style="bold")
    _say(f"  {'cause' if finding.role == 'cause' else 'means'}:  {finding.cause}")
    _say(f"  hint: {finding.hint}")


def _say(text: str, style: str | None = None) -> None:
    stdout.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

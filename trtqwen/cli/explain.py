"""`trtqwen explain`: what a log of TensorRT-LLM, Triton or NCCL complains of, and what helps."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trtqwen.cli.output import Json, print_json, stdout
from trtqwen.diagnostics import InputError
from trtqwen.engine.explain import explain


def command(
    log: Annotated[Path, typer.Argument(help="Log file; - reads standard input.")],
    json: Json = False,
) -> None:
    """Explain a log of trtllm-build, Triton or NCCL: the telling lines, their cause, the remedy."""
    name = "standard input" if str(log) == "-" else str(log)
    try:
        with nullcontext(sys.stdin) if str(log) == "-" else log.open(encoding="utf-8", errors="replace") as lines:
            findings = explain(lines)
    except OSError as problem:
        raise InputError(f"{log}: cannot be read ({problem.strerror})", "name a log file, or - for input") from None
    if json:
        print_json({"log": name, "findings": [asdict(finding) for finding in findings]})
    for finding in [] if json else findings:
        more = f" (and {finding.times - 1} more like it)" if finding.times > 1 else ""
        stdout.print(
            f"line {finding.number}: {finding.line}{more}",
            style="bold",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        stdout.print(f"  cause:  {finding.cause}", markup=False, highlight=False, soft_wrap=True)
        stdout.print(f"  remedy: {finding.hint}", markup=False, highlight=False, soft_wrap=True)
    if not findings:
        if not json:
            stdout.print(f"{name}: holds no failure that trtqwen knows", markup=False, highlight=False)
        raise typer.Exit(1)

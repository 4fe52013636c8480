"""The report of a host in one file: versions, checks, plan, selftest and logs, without secrets."""

from __future__ import annotations

import getpass
import io
import json
import os
import platform
import re
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console

from trtqwen import __version__
from trtqwen.artifact.directory import write_file
from trtqwen.diagnostics import InputError, TrtQwenError
from trtqwen.doctor.run import examine
from trtqwen.doctor.subject import Subject
from trtqwen.engine.explain import explain
from trtqwen.plan.plan import plan_recipe
from trtqwen.plan.show import print_plan
from trtqwen.selftest import RESULT

_PACKAGES = ("tensorrt_llm", "tensorrt", "torch", "transformers", "tritonclient", "numpy", "vllm", "mpi4py")
_TAIL = 120  # lines of each log
_HIDDEN = "[removed]"

# What looks like a secret, wherever it stands.
_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?:hf|nvapi|sk|ghp|gho|github_pat|glpat|xox[abp])[-_][A-Za-z0-9_\-]{8,}",
        r"(?<=bearer )[A-Za-z0-9._~+/\-]{8,}=*",
        r"\beyJ[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]*",
        r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
        r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",
    )
)
# A name that says so, and the value after it; counts of tokens are no secrets.
_NAMED = re.compile(
    r"""(?ix) (?P<name> [\w.-]* (?: password | passwd | secret | api[_-]?keys? | access[_-]?key | auth[_-]?token
        | (?<![a-z]) token | credential s? ) ["']? \s* [:=] \s* ) (?P<value> "[^"]*" | '[^']*' | [^\s,;&}]+ )"""
)
_COUNT = re.compile(r"""^["']?[\d.,]*["']?$""")


@dataclass(frozen=True)
class ReportRequest:
    """The content of a report.

    Attributes:
        subject: what `doctor` examines.
        engines: parent of the directories with build logs and the selftest's result.
        logs: further logs.
    """

    subject: Subject
    engines: Path
    logs: Sequence[Path] = ()


def write_report(request: ReportRequest, output: Path) -> None:
    """Write the report, Markdown.

    Raises:
        InputError: if a named log cannot be read.
    """
    text = "\n".join(_sections(request))
    write_file(output, redacted(text))


def redacted(text: str) -> str:
    """Remove text that looks like a secret, and the names of this user, home and host."""
    for secret in _SECRETS:
        text = secret.sub(_HIDDEN, text)
    text = _NAMED.sub(lambda found: found["name"] + (found["value"] if _is_count(found) else _HIDDEN), text)
    for name, stands_for in _own_names():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", stands_for, text)
    return text


def _is_count(found: re.Match[str]) -> bool:
    return bool(_COUNT.match(found["value"])) and "pass" not in found["name"].lower()


def _own_names() -> list[tuple[str, str]]:
    names = [(str(Path.home()), "~"), (socket.gethostname(), "HOST")]
    with suppress(OSError, KeyError):
        names.append((getpass.getuser(), "USER"))
    return [(name, stands_for) for name, stands_for in names if len(name) > 2 and name not in ("/", "root")]


def _sections(request: ReportRequest) -> Iterable[str]:
    subject = request.subject
    yield f"# Report of trtqwen {__version__}\n"
    yield "Secrets, the user's name, home and host name were removed. Read it before you attach it.\n"
    yield from _block("Versions", _versions(subject))
    yield from _block("trtqwen doctor", _doctor(subject))
    if subject.recipe is not None:
        yield from _block(f"Recipe {subject.recipe.name}", [json.dumps(subject.recipe.model_dump(), indent=1)])
        yield from _block("trtqwen plan", _plan(subject))
    result = request.engines / "selftest" / RESULT
    if result.is_file():
        yield from _block("trtqwen selftest", [result.read_text(encoding="utf-8", errors="replace")])
    else:
        yield "## trtqwen selftest\n\nNot run here.\n"
    built = sorted(request.engines.glob("*/build.log")) + sorted(request.engines.glob("selftest/*/build.log"))
    for log in dict.fromkeys([*request.logs, *built]):
        yield from _log(log)


def _block(title: str, lines: Iterable[str]) -> Iterable[str]:
    text = "\n".join(lines).rstrip()
    fence = "`" * max(4, *(len(ticks) + 1 for ticks in re.findall(r"`+", text) or [""]))
    yield f"## {title}\n\n{fence}text\n{text}\n{fence}\n"


def _versions(subject: Subject) -> Iterable[str]:
    host = subject.host
    yield f"trtqwen {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"driver {host.driver}, image {host.image_digest or host.image}"
    yield f"TensorRT-LLM {host.tensorrt_llm}, TensorRT {host.tensorrt}"
    for gpu in host.gpus:
        yield f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_mib} MiB"
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"
    for name in sorted(os.environ):
        if name.startswith(("NCCL_", "CUDA_VISIBLE_DEVICES", "OMPI_", "TRTLLM_", "TRTQWEN_IMAGE")):
            yield f"{name}={os.environ[name]}"
    docker = subject.system.output("docker", "version", "--format={{.Server.Version}}")
    yield f"docker {docker.strip() if docker else 'does not answer'}"


def _doctor(subject: Subject) -> Iterable[str]:
    for found in examine(subject):
        result = found.result
        if result.verdict != "skip":
            yield f"{result.verdict:<5}{found.check.id} {found.check.title}: {result.evidence}"
            yield from (f"          -> {hint}" for hint in result.hint.splitlines())


def _plan(subject: Subject) -> Iterable[str]:
    assert subject.recipe is not None
    console = Console(file=io.StringIO(), width=110, color_system=None)
    try:
        print_plan(plan_recipe(subject.recipe, subject.model), console)
    except TrtQwenError as problem:
        yield str(problem)
        return
    yield console.file.getvalue()  # type: ignore[attr-defined]


def _log(path: Path) -> Iterable[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            explanation = explain(lines)
        with path.open(encoding="utf-8", errors="replace") as lines:
            tail = deque((line.rstrip("\n") for line in lines), _TAIL)
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})", "name a log file") from None
    yield f"## Log {path}\n"
    first = explanation.first
    if first is not None:
        label = "Cause" if first.role == "cause" else "Means"
        yield f"Line {first.number}: `{first.line}`\n\n{label}: {first.cause}. Hint: {first.hint}.\n"
    for number, line in explanation.telling:
        yield f"Line {number}: `{line}`\n"
    yield from _block(f"Last lines of {path.name}", tail)

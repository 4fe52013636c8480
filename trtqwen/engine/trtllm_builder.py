"""Builder of TensorRT engines: run the installed `trtllm-build` and check its result."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

from trtqwen.artifact.names import CONFIG, rank_engine
from trtqwen.artifact.stage import BuildProgress
from trtqwen.diagnostics import EngineError
from trtqwen.engine.effective import changed_settings, check_promises
from trtqwen.engine.explain import explain
from trtqwen.engine.flags import NOT_IN_RESULT, Flags, build_flags, check_against_help, check_command, command_line
from trtqwen.engine.gates import check_host
from trtqwen.engine.job import BuildJob, Watch
from trtqwen.engine.provenance import PROVENANCE, provenance_of
from trtqwen.system.child import run_logged
from trtqwen.system.host import Host, read_host

LOG = "build.log"
_ENVIRONMENT = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that CUDA's GPU numbers are those of nvidia-smi
    "PYTHONUNBUFFERED": "1",
}
_HELP_SECONDS = 600  # importing TensorRT-LLM from a cold disk takes its time


class BuildFailed(EngineError):
    """trtllm-build did not build an engine.

    Attributes:
        log: its whole output.
    """

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(f"{message}; log: {log}")
        self.log = log


def log_tail(log: Path, lines: int = 20) -> list[str]:
    """The last lines of a log."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]


class TrtLlmBuilder:
    """Builds TensorRT engines on a machine with TensorRT-LLM and the GPU that will serve.

    Args:
        host: the machine; None looks at it.
    """

    def __init__(self, host: Host | None = None) -> None:
        self._host = host or read_host()

    def check(self, job: BuildJob) -> None:
        """Check the machine and every flag against the requirements of the build.

        Raises:
            EngineError: with the hint.
        """
        command = command_line(self._flags(job), job.checkpoint, job.output, job.settings.release)
        check_command(command, job.settings.release)
        check_host(
            self._host, job.settings.release, job.card, workers=job.recipe.workers, command=shlex.join(command)
        )
        check_against_help(command, self._help())

    def build(self, job: BuildJob, directory: Path, watch: Watch) -> None:
        """Run trtllm-build; its log stays next to the engine's directory in any case.

        Raises:
            BuildFailed: if it fails, naming the cause as far as its log tells.
            EngineError: if the engine differs from the requested one.
        """
        flags = self._flags(job)
        command = command_line(flags, job.checkpoint, directory, job.settings.release)
        log = job.output.parent / LOG

        def on_line(line: str) -> None:
            done = len(list(directory.glob("rank*.engine")))
            watch(BuildProgress(line, done, job.ranks))

        assert self._host.trtllm_build is not None
        code = run_logged([str(self._host.trtllm_build), *command[1:]], log, on_line, _ENVIRONMENT)
        if code != 0:
            raise BuildFailed(f"trtllm-build failed ({_ending(code)}): {_cause(code, log)}", log)
        config = _read_result(directory, job.ranks, log)
        if job.serve is not None:
            check_promises(config, job.serve)
        lasting = {name: value for name, value in flags.items() if name not in NOT_IN_RESULT}
        record = provenance_of(self._host, job.checkpoint_key, lasting, changed_settings(flags, config))
        (directory / PROVENANCE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def _flags(self, job: BuildJob) -> Flags:
        # A machine without GPUs gets the recipe's own command: it is for another machine.
        gpus = len(self._host.visible_gpus) or None
        return build_flags(job.recipe, job.settings, gpus=gpus)

    def _help(self) -> str:
        try:
            result = subprocess.run(
                [str(self._host.trtllm_build), "--help"], capture_output=True, text=True, timeout=_HELP_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise EngineError(
                f"`trtllm-build --help` does not run ({problem})", "repair TensorRT-LLM's installation"
            ) from None
        if result.returncode != 0:
            output = result.stdout + result.stderr
            first = explain(output.splitlines()).first
            why = first.cause if first else _last_line(output)
            raise EngineError(
                f"`trtllm-build --help` failed ({_ending(result.returncode)}): {why}", first.hint if first else ""
            )
        return result.stdout


def _read_result(directory: Path, ranks: int, log: Path) -> dict[str, Any]:
    """The engine's config.json, once every rank has its file."""
    for rank in range(ranks):
        file = directory / rank_engine(rank)
        if not file.is_file() or file.stat().st_size == 0:
            raise BuildFailed(f"trtllm-build ended well, but {file.name} is missing or empty; build again", log)
    try:
        content: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        content["pretrained_config"]["dtype"], content["build_config"]["plugin_config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BuildFailed("trtllm-build ended well, but config.json is missing or of another form", log) from None
    return content


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"ended by {signal.Signals(-code).name}"


def _cause(code: int, log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as file:
        explanation = explain(file)
    if explanation.first is not None:
        return f"{explanation.first.cause}; {explanation.first.hint}"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            "it was killed from outside, usually by the kernel because the host ran out of memory; lower "
            "engine.workers, or give the host or container more memory"
        )
    shown = "; ".join(f"line {number}: {line}" for number, line in explanation.telling[:2])
    return f"the cause is not known{f', see {shown}' if shown else ''}"


def _last_line(text: str) -> str:
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

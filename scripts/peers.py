"""Servers that the serving benchmarks hold against each other: `trtqwen serve` and vLLM's OpenAI server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_TICKS = os.sysconf("SC_CLK_TCK")
_START_SECONDS = 900


@dataclass(frozen=True)
class Usage:
    """CPU seconds since the start of the machine's processes, by what each program is called."""

    seconds: dict[str, float]

    def since(self, before: Usage) -> dict[str, float]:
        return {name: round(value - before.seconds.get(name, 0), 2) for name, value in self.seconds.items()}


class Server:
    """A server in a session of its own; a context manager that waits until it answers.

    Attributes:
        url: of its OpenAI routes.
        start_s: seconds from start to the first answer.
    """

    def __init__(
        self, command: Sequence[str], url: str, ready: str, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.url = url
        self._ready = ready
        self.start_s = 0.0
        self._command = command
        self._log = log
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Server:
        begun = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() - begun > _START_SECONDS:
                self._stop()
                raise SystemExit(f"{self._command[:4]} did not start; its log ends:\n{self._tail()}")
            time.sleep(0.2)
        self.start_s = round(time.perf_counter() - begun, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def usage(self) -> Usage:
        """What the server and its descendants have used."""
        children: dict[int, list[int]] = {}
        seconds: dict[int, tuple[str, float]] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_text("utf-8", "replace").split("\0")
            except OSError:
                continue
            pid = int(entry.name)
            children.setdefault(int(fields[1]), []).append(pid)
            seconds[pid] = (_name(words), (int(fields[11]) + int(fields[12])) / _TICKS)
        total: dict[str, float] = {}
        todo = [self._process.pid]
        while todo:
            pid = todo.pop()
            todo += children.get(pid, [])
            if pid in seconds:
                name, used = seconds[pid]
                total[name] = total.get(name, 0.0) + used
        return Usage(total)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{self._ready}", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-15:])


def trtqwen_server(
    repository: Path, name: str, log: Path, gateway: dict[str, object] | None = None, grpc_port: int = 0
) -> Server:
    """`trtqwen serve` on a repository.

    Args:
        gateway: settings of the gateway, in addition to its defaults.
        grpc_port: of Triton; 0 takes a free one.
    """
    port = free_port()
    settings = log.with_suffix(".gateway.yaml")
    settings.write_text(json.dumps(gateway or {}), "utf-8")
    command = [sys.executable, "-m", "trtqwen", "serve", "--repo", str(repository), "--model-name", name]
    command += ["--http-port", "0", "--grpc-port", str(grpc_port), "--metrics-port", "0"]
    command += [
        "--gateway-port",
        str(port),
        "--no-verify",
        "--gateway-config",
        str(settings),
        "--log",
        str(log.with_suffix(".triton.log")),
    ]
    return Server(command, f"http://127.0.0.1:{port}", "/ready", log)


def vllm_server(
    python: str, model: Path, name: str, log: Path, flags: Sequence[str], environment: dict[str, str] | None = None
) -> Server:
    """vLLM's OpenAI server, in its own environment."""
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    return Server(command, f"http://127.0.0.1:{port}", "/health", log, environment)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _name(words: Sequence[str]) -> str:
    line = " ".join(words)
    for part, name in (
        ("trtqwen.executor.worker", "engine"),
        ("trtqwen.gateway", "gateway"),
        ("python_backend_stub", "stub"),
        ("tritonserver", "triton"),
        ("VLLM", "vllm core"),
        ("spawn_main", "vllm core"),
        ("api_server", "vllm api"),
    ):
        if part in line:
            return name
    return Path(words[0]).name or "other"

"""A real `trtqwen serve` under load."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from trtqwen.recipe import ServeRecipe
from trtqwen.system.sockets import listen
from trtqwen.triton.repository import write_repository


def free_port() -> int:
    """A port that nobody listens on now."""
    with listen("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


class Serve:
    """`trtqwen serve`, started from the command line on free ports."""

    def __init__(self, repository: Path, *options: str, errors: IO[str] | int = subprocess.DEVNULL) -> None:
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "gateway")]
        command = [sys.executable, "-m", "trtqwen", "serve", f"--repo={repository}", *ports, "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        self.addresses = json.loads("".join(lines))
        self.gateway = str(self.addresses["gateway"])

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        request = urllib.request.Request(
            self.gateway + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as problem:
            return problem.code, problem.read().decode()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.gateway + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as problem:
            return problem.code, problem.read().decode()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def served_repository(bundled_engine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with KV cache reuse."""
    output = tmp_path_factory.mktemp("deploy") / "repository"
    write_repository(bundled_engine(), ServeRecipe(triton_max_batch_size=8, enable_kv_cache_reuse=True), output)
    return output


@pytest.fixture(scope="session")
def serve(served_repository: Path) -> Iterator[Serve]:
    running = Serve(served_repository)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def load(serve: Serve) -> Iterator[None]:
    """Good and bad requests, until the test ends."""
    ended = threading.Event()
    prompt = "The quick brown fox jumps over the lazy dog. " * 4

    def ask() -> None:
        number = 0
        while not ended.wait(0.5):  # the machine has other work
            number += 1
            body = {"model": "repository", "prompt": prompt + str(number), "max_tokens": 8, "stream": number % 2 == 0}
            if number % 3 == 0:
                body["max_tokens"] = -1  # refused
            with suppress(OSError):
                serve.post("/v1/completions", body)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()

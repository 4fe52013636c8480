"""A contender of a comparison: a repository that the comparison serves, or the address of a running server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from trtqwen.artifact.manifest import MANIFEST
from trtqwen.artifact.names import TOKENIZER_DIRECTORY
from trtqwen.bench.endpoint import Target
from trtqwen.bench.run import probe
from trtqwen.diagnostics import InputError, ServerError
from trtqwen.engine.config import EngineConfig, read_engine_config
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import load_recipe
from trtqwen.system.host import read_host
from trtqwen.system.processes import die_with_parent, resident_bytes

START_SECONDS = 1800
_STOP_SECONDS = 120


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
        name: in the report.
        repository: to serve; None for an address.
        url: of a server that runs already; None for a repository.
    """

    name: str
    repository: Path | None = None
    url: str | None = None
    model_name: str | None = None


@dataclass(frozen=True)
class Running:
    """A running contender.

    Attributes:
        startup: seconds until it answered; None for an address.
        pid: of `trtqwen serve`; None for an address.
    """

    contender: Contender
    target: Target
    about: dict[str, Any]
    startup: float | None
    pid: int | None

    @property
    def memory(self) -> dict[str, float] | None:
        """Return the memory in use in GiB: of all processes, and of all GPUs of the machine; None for an address."""
        if self.pid is None:
            return None
        gpus = sum(gpu.used_mib for gpu in read_host().gpus) / 1024
        return {"host_gib": resident_bytes(self.pid) / 2**30, "gpu_gib": gpus}


def find_contender(text: str, repositories: Path) -> Contender:
    """Find a contender by an address, a model repository, or a built recipe.

    Raises:
        InputError: if it is none of them.
    """
    name, separator, place = text.partition("=")
    if not separator:
        name, place = "", text
    if place.startswith(("http://", "https://")):
        return Contender(name or place, url=place)
    if (Path(place) / MANIFEST).is_file():
        return Contender(name or Path(place).resolve().name, repository=Path(place))
    host, _, port = place.rpartition(":")
    if host and port.isdecimal():
        return Contender(name or place, url=place)
    recipe = load_recipe(place)
    repository = repositories / recipe.name
    if not (repository / MANIFEST).is_file():
        raise InputError(
            f"{repository}: holds no model repository", f"run `trtqwen build {place} --model MODEL` first"
        )
    return Contender(name or recipe.name, repository=repository)


def contender_engine(contender: Contender) -> Path | None:
    """Return the engine directory of a contender; None if it is not on this machine."""
    if contender.repository is None:
        return None
    parameters = json.loads((contender.repository / MANIFEST).read_text(encoding="utf-8"))["parameters"]
    return Path(parameters["engine"])


def find_vocabulary(contenders: list[Contender], given: Path | None) -> tuple[Tokenizer, EngineConfig | None]:
    """The tokenizer, and a config with the sizes of the model, from the first contender that has them.

    Raises:
        InputError: if none has a tokenizer and none is given.
    """
    for engine in filter(None, map(contender_engine, contenders)):
        directory = given or engine / TOKENIZER_DIRECTORY
        return Tokenizer(directory), read_engine_config(engine)
    if given is None:
        raise InputError("no address reports its tokenizer", "pass --tokenizer")
    return Tokenizer(given), None


@contextmanager
def serving(contender: Contender, log: Path) -> Iterator[Running]:
    """Start a contender and stop it when the block ends. A contender with an address is already running.

    Raises:
        ServerError: if it does not start, with the last line that it wrote.
    """
    if contender.url is not None:
        target, about = probe(contender.url, contender.model_name)
        yield Running(contender, target, about, None, None)
        return
    begun = time.monotonic()
    command = [sys.executable, "-m", "trtqwen", "serve", f"--repo={contender.repository}", "--json", f"--log={log}"]
    command += [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "gateway")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGTERM),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = _Listener(process.stderr)
    try:
        endpoints = _endpoints(process.stdout)
        if endpoints is None:
            status = process.wait()
            reason = said.last() or f"it ended with status {status} and said nothing"
            raise ServerError(f"{contender.name}: did not start: {reason}", f"see {log}")
        startup = time.monotonic() - begun
        several = "servers" in endpoints
        target, about = probe(endpoints["gateway"] if several else endpoints["grpc"], None)
        engine = contender_engine(contender)
        assert engine is not None
        about["backend"] = read_engine_config(engine).backend
        yield Running(contender, target, about, startup, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _endpoints(stdout: IO[str]) -> dict[str, Any] | None:
    """Return the object that `serve --json` prints when it is ready; None if it ends before that."""
    text = ""
    for line in stdout:
        text += line
        if line.rstrip() == "}":
            content: dict[str, Any] = json.loads(text)
            return None if "error" in content else content
    return None


class _Listener:
    """Reads the output of a process, so that the process never blocks, and keeps the last error."""

    def __init__(self, source: IO[str]) -> None:
        self._last, self._source = "", source
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def last(self) -> str:
        """The last error of a process that has ended; empty if it wrote none."""
        self._thread.join(_STOP_SECONDS)  # what it wrote last may not be read yet
        return self._last

    def _read(self) -> None:
        with self._source:
            for line in self._source:
                if line.startswith("error: "):
                    self._last = line.removeprefix("error: ").strip()


def with_vocabulary(running: Running, config: EngineConfig | None, stop_ids: tuple[int, ...]) -> Target:
    """The target with answers kept, for agreement."""
    size = 0 if config is None else config.pretrained_config.vocab_size
    return replace(running.target, keep=True, ignore_eos=False, stop_ids=stop_ids, vocab_size=size)

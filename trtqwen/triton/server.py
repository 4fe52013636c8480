"""Starts the real tritonserver on a model repository, waits until it is ready, and stops it without leftovers."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from trtqwen.diagnostics import InputError, ServerError
from trtqwen.engine.provenance import check_provenance
from trtqwen.system.guarded import Farewell, start_guarded
from trtqwen.system.guardian import ENVIRONMENTS, environments, remove_environments
from trtqwen.system.host import Host, read_host
from trtqwen.system.leftovers import SHARED_MEMORY, shared_memory, sweep
from trtqwen.system.leftovers import workspace as new_workspace
from trtqwen.system.limits import check_loopback, check_shared_memory
from trtqwen.system.processes import Service, ending, kill_session, programs, runs
from trtqwen.system.sockets import reachable
from trtqwen.triton.environment import server_environment
from trtqwen.triton.installation import find_tritonserver, link_backends
from trtqwen.triton.integrity import check_served_files
from trtqwen.triton.launch import (
    Endpoint,
    Launch,
    RankHosts,
    check_spread,
    plan_launch,
    python_instances,
    read_deployment,
    server_devices,
)
from trtqwen.triton.model_parameters import (
    ENGINE_DEATH,
    FILES_VERIFIED,
    GRPC_ADDRESS,
    HEARTBEAT,
    VLLM_PID,
    VLLM_SOCKET,
)
from trtqwen.triton.parameters import repository_parameters
from trtqwen.triton.ports import Ports, claim
from trtqwen.triton.ready import is_ready
from trtqwen.triton.server_log import GONE, ServerLog, without_error
from trtqwen.triton.watchdog import Heartbeat, IterationCounter, Watchdog
from trtqwen.vllm.server import VllmPlace, VllmServer

_logger = logging.getLogger(__name__)
_START_FAULTS = 3  # starts that may end so, one after the other
_UNLOAD_SECONDS = 5  # a model whose request was not released does not unload: trtqwen.triton.streams
_REGION_BYTES = 1 << 20  # shared memory that the python backend takes for each instance of a model
_HELPERS = ("triton_python_backend_stub", "trtllmExecutorWorker")  # of each python model, of each rank


class TritonServer(Service):
    """A running tritonserver on a finished repository; use as a context manager or call `start` and `stop`.

    The server, its python models and the engine's ranks end with this process, for any reason.

    Args:
        repository: model repository that `trtqwen build` wrote.
        host: address to listen on.
        log: file for the server's log; None keeps it in a temporary file while the server runs.
        drain_seconds: how long `stop` lets running requests finish.
        replica: which of the repository's servers this is, from 0; it takes that replica's GPUs.
        watchdog_seconds: longest step of an engine before it counts as hung; 0 turns the watchdog off.
        verify: read every file of repository and engine and compare its digest; otherwise only sizes are compared.
        gpus: numbers of the GPUs for all of the repository's servers; None is all that are visible.
        spread: the machines of an engine's ranks; None is this one.

    Attributes:
        ports: the ports in use; a 0 has become the port picked.

    Raises:
        InputError: if the repository or its engine is not finished.
        PortInUseError: if a port is taken.
        ServerError: if the engine does not run on this machine, or there is no tritonserver, or no mpirun for an
            engine of several ranks.
    """

    def __init__(
        self,
        repository: Path,
        *,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        log: Path | None = None,
        drain_seconds: int = 30,
        replica: int = 0,
        verify: bool = True,
        watchdog_seconds: float = 0,
        gpus: Sequence[int] | None = None,
        spread: RankHosts | None = None,
    ) -> None:
        check_served_files(repository, digests=verify)
        self._repository = repository.resolve()
        self._deployment = read_deployment(self._repository)
        self._machine: Host | None = None
        if self._deployment.engine is not None or self._deployment.servers > 1:
            self._machine = read_host()
        engine, machine = self._deployment.engine, self._machine
        if engine is not None and machine is not None and (problems := check_provenance(engine, machine)):
            raise ServerError(str(problems[0]))
        self._spread = spread
        if spread is not None:
            check_spread(self._deployment, spread)
        here = self._deployment if spread is None else replace(self._deployment, world_size=spread.here)
        self._devices = server_devices(here, self._machine, gpus)[replica]
        if ":" in host:
            raise InputError(f"{host}: Triton takes no IPv6 address", "let it listen on an IPv4 address")
        self._installation = find_tritonserver()
        self.host = host
        self._claims = ExitStack()
        self.ports = claim(ports or Ports(), host, self._claims)
        self._log = log
        self._keeps_log = log is not None
        self._drain_seconds = drain_seconds
        self._shm_prefix = f"trtqwen-{uuid.uuid4().hex[:12]}-"
        self._cleanup = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._ranks: dict[int, list[str]] = {}
        self._helpers: dict[int, list[str]] = {}
        self._broken = self._served = False
        self._log_start = self._starts = self._faults = 0
        self._vllm = self._vllm_server(log)
        if self._vllm is not None:
            self.start_seconds = self._vllm.start_seconds
        self._waiting: Callable[[], None] | None = None  # starts Triton, once vLLM listens
        self._watchdog_seconds = watchdog_seconds
        self._watchdog: Watchdog | None = None
        self.stop_seconds = drain_seconds

    def _vllm_server(self, log: Path | None) -> VllmServer | None:
        """The vLLM that the repository's engine needs; its log lies next to Triton's."""
        if self._deployment.vllm is None:
            return None
        executor = repository_parameters(self._repository).executor
        own_log = log.with_name(f"{log.stem}-vllm{log.suffix}") if log else None
        return VllmServer(self._deployment.vllm, executor, devices=self._devices, log=own_log)

    @property
    def http_url(self) -> str:
        """Triton's HTTP endpoint.

        Raises:
            ServerError: if HTTP is off.
        """
        if self.ports.http is None:
            raise ServerError("Triton's HTTP endpoint is off", "start the server with an HTTP port")
        return f"{reachable(self.host)}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        return f"{reachable(self.host)}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"{reachable(self.host)}:{self.ports.metrics}"

    @property
    def pid(self) -> int:
        """Process id of the command started (tritonserver, or mpirun), also its session's."""
        return self._running.pid

    @property
    def vllm_pid(self) -> int | None:
        """Process id of vLLM's guardian, also its session's; None if no vLLM was started for this server."""
        return None if self._vllm is None else self._vllm.pid

    @property
    def log(self) -> Path:
        """The file with the server's log."""
        if self._log is None:
            raise ServerError("the server has not been started", "call start() first")
        return self._log

    def launch(self, backends: Path | None = None) -> Launch:
        """The command that `start` runs.

        Args:
            backends: directory for links to the backends of the tritonserver inside nvidia-pytriton.
        """
        if backends is None and self._installation.home is not None:
            backends = Path(tempfile.gettempdir(), "trtqwen-triton", "backends")
        launch = plan_launch(
            self._repository,
            self._deployment,
            self._installation.binary,
            Endpoint(self.host, self.ports.http, self.ports.grpc, self.ports.metrics),
            shm_prefix=self._shm_prefix,
            drain_seconds=self._drain_seconds,
            backends=backends,
            host=self._machine,
            devices=self._devices,
            spread=self._spread,
        )
        environment = {**launch.environment, GRPC_ADDRESS: self.grpc_url}
        if self._vllm is None:
            return replace(launch, environment=environment)
        socket = Path(tempfile.gettempdir(), "trtqwen-vllm.socket")
        environment[VLLM_SOCKET] = str(socket)
        command = tuple(self._vllm.command(socket))
        return replace(launch, environment=environment, vllm=command, vllm_environment=self._vllm.settings)

    def start(self) -> None:
        """Start the processes; `wait_until_ready` tells when they serve. Triton starts when its vLLM listens."""
        sweep()
        check_loopback()
        check_shared_memory(python_instances(self._repository) * _REGION_BYTES)
        workspace = self._cleanup.enter_context(new_workspace())
        self._cleanup.enter_context(shared_memory(self._shm_prefix))
        home = self._installation.home
        launch = self.launch(link_backends(home, workspace) if home else None)
        if shutil.which(launch.command[0], path=server_environment(self._installation).get("PATH")) is None:
            raise ServerError(
                (f"{launch.command[0]} is not on this machine, but an engine of several ranks is started with it"),
                "run in NVIDIA's Triton container",
            )
        self._tritonservers = launch.tritonservers
        self._ranks, self._helpers, self._broken, self._served = {}, {}, False, False
        if self._log is None:
            self._log = workspace / "triton.log"
            self._cleanup.callback(setattr, self, "_log", None)
        self._engine_death = workspace / "engine-death"
        if self._vllm is None:
            self._start_triton(launch, workspace)
        else:
            self._vllm.start()
            self._waiting = partial(self._start_triton, launch, workspace, self._vllm.place)

    def _start_triton(self, launch: Launch, workspace: Path, vllm: VllmPlace | None = None) -> None:
        self._waiting = None
        heartbeat = workspace / "heartbeat"
        environment = server_environment(self._installation)
        environment |= {ENGINE_DEATH: str(self._engine_death), FILES_VERIFIED: "1", HEARTBEAT: str(heartbeat)}
        environment["TMPDIR"] = str(workspace)  # what its processes keep there goes with it
        record = workspace / ENVIRONMENTS
        record.write_text(json.dumps({"before": environments(), "since": time.time()}), encoding="utf-8")
        self._cleanup.callback(remove_environments, str(record))
        if vllm is not None:
            launch = replace(launch, environment={**launch.environment, VLLM_SOCKET: str(vllm.socket)})
            environment[VLLM_PID] = str(vllm.pid)
        self._claims.close()
        with self.log.open("ab" if self._starts else "wb") as log:
            self._log_start, self._starts = log.tell(), self._starts + 1
            self._process = start_guarded(
                launch.command,
                {**environment, **launch.environment},
                workspace,  # Python looks for modules in the working directory: no other user writes to this one
                output=log,
                farewell=Farewell(remove=(workspace,), shared_memory=self._shm_prefix),
            )
        if self._watchdog_seconds:
            compiled = self._deployment.engine is not None
            progress = IterationCounter(f"http://{self.metrics_url}/metrics") if compiled else Heartbeat(heartbeat)
            strict = compiled or bool(read_host().gpus)
            sessions = [self._process.pid, *([vllm.pid] if vllm is not None and vllm.pid is not None else [])]
            self._watchdog = Watchdog(sessions, progress, self._watchdog_seconds, strict=strict)

    def answers(self) -> bool:
        """Whether every model is loaded."""
        if self._waiting is not None:
            if self._vllm is not None and self._vllm.answers():
                self._waiting()
            return False
        ready = is_ready(None if self.ports.http is None else self.http_url, self.grpc_url)
        if ready:
            self._served, self._faults = True, 0
        if ready and not self._helpers:
            self._helpers = programs(self.pid, _HELPERS)
            for region in SHARED_MEMORY.glob(f"{self._shm_prefix}*"):
                region.chmod(0o600)  # Triton makes them readable for all under any umask: they hold prompts
        return ready

    def late(self) -> ServerError:
        if self._waiting is not None and self._vllm is not None:
            return self._vllm.late()
        return self._read_log().error(super().late().what)

    def check(self) -> None:
        """Raise a ServerError if the server, one of its ranks, python models or embedded engine has ended by itself.

        Triton continues without them and does not restart them.
        """
        try:
            self._check()
        except ServerError:
            self._broken = True
            raise

    def _check(self) -> None:
        if self._vllm is not None:
            self._vllm.check()
        if self._waiting is not None or self._started_again():
            return
        if problem := self._problem():
            if self._vllm is not None:
                self._vllm.check(closed=True)  # its own end, if that is the cause, says more
            own_error = None if self._running.poll() is None else self._read_log().own_error
            raise ServerError(*own_error) if own_error else problem

    def _started_again(self) -> bool:
        """Return whether Triton crashed by a known bug during its start and was started again."""
        ended = self._process is not None and self._process.poll() is not None
        if not ended or self._served or self._faults == _START_FAULTS or not self._read_log().start_fault:
            return False
        self._faults += 1
        _logger.warning("Triton crashed while it started, by a fault of its python backend: starting it again")
        self.stop(drain=False)
        self.start()
        return True

    @property
    def hung(self) -> str | None:
        """Return why the server counts as hung; None if it does not, or without a watchdog."""
        return self._watchdog.hung() if self._watchdog is not None and self._served else None

    def _problem(self) -> ServerError | None:
        if self._tritonservers > max(1, len(self._ranks)):
            self._ranks = programs(self.pid, [self._installation.binary.name])
        ended = [command for pid, command in {**self._ranks, **self._helpers}.items() if not runs(pid)]
        if ended:
            with suppress(subprocess.TimeoutExpired):
                self._running.wait(1)  # its own end, if that is what takes them along, says more
        code = self._running.poll()
        if code is not None:
            return self._read_log().error(f"Triton {ending(code)}", without_error(code))
        with suppress(FileNotFoundError):
            if death := self._engine_death.read_text("utf-8"):
                return ServerError(f"{death} ({self._advice})")
        if ended:
            return self._read_log().error(f"a process of {_name(ended[0])} has ended by itself", GONE)
        return ServerError(f"the engine hangs: {hung} ({self._advice})") if (hung := self.hung) else None

    def stop(self, *, drain: bool = True) -> None:
        """Let running requests finish, then end every process of the server. May be called again.

        After `check` has found an error, it does not wait, because requests on a dead engine cannot finish.
        """
        self._claims.close()
        self._waiting = None
        process = self._process
        if process is not None:
            if process.poll() is None and drain and not self._broken:
                process.terminate()
                self._wait_for_end(process)
            kill_session(process.pid)
            process.wait()
            self._process = None
        if self._vllm is not None:
            self._vllm.stop(drain=drain and not self._broken)
        self._cleanup.close()

    def kill(self) -> None:
        if (process := self._process) is not None:
            kill_session(process.pid)
        if self._vllm is not None:
            self._vllm.kill()

    def _wait_for_end(self, process: subprocess.Popen[str]) -> None:
        """Wait while requests run; wait only briefly for models that do not unload."""
        deadline, unloading = time.monotonic() + self.stop_seconds + 10, None
        while process.poll() is None and time.monotonic() < deadline:
            if unloading is None and self._read_log().unloading:
                unloading = time.monotonic()
            if unloading is not None and time.monotonic() - unloading > _UNLOAD_SECONDS:
                return
            time.sleep(0.05)

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ServerError("the server is not running", "call start() first")
        return self._process

    def _read_log(self) -> ServerLog:
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return ServerLog(file.read().decode("utf-8", "replace"), self._advice)

    @property
    def _advice(self) -> str:
        return f"see {self._log}" if self._keeps_log else "start it with --log FILE to see more"


def _name(command: list[str]) -> str:
    """Return the name of a process: the model of a python stub, or the program."""
    models = [Path(word).parts[-3] for word in command if word.endswith("/1/model.py")]
    return [Path(command[0]).name, *models][-1]

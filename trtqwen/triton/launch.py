"""The launch of a repository: its exact command and environment, computed before the start.

- One rank: tritonserver itself.
- Several ranks (leader mode): mpirun with one tritonserver per rank; rank 0 serves, the others load the engine's
  model alone and open no ports.
- Several replicas, `serve.replica_mode: servers`: one of the above for each replica, with GPUs and ports of its own.
- Several replicas, `serve.replica_mode: orchestrator`: one tritonserver that spawns the workers of all of them, each
  replica on the GPUs that the model's `gpu_device_ids` gives it; clients see one address.

Source: triton_backend/scripts/launch_triton_server.py of TensorRT-LLM 1.2, which in leader mode gives all ranks the
same ports; NVIDIA's Kubernetes tutorial switches the workers' ports off, as is done here.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from trtqwen.artifact.manifest import read_manifest
from trtqwen.artifact.names import MODEL_CONFIG, rank_engine
from trtqwen.diagnostics import InputError
from trtqwen.engine.config import read_engine_config
from trtqwen.facts.cards import has_peer_to_peer
from trtqwen.system.host import Host

ENGINE_MODEL = "tensorrt_llm"
_CPP_BACKEND = "tensorrtllm"
# Open MPI binds the processes of a small job to one core each, which Triton, its python models and their threads
# would share, and refuses more processes than it counts cores.
MPIRUN = ("mpirun", "--allow-run-as-root", "--bind-to", "none", "--oversubscribe")
# What lets a client read or change the server's insides: shared memory regions, the log, traces, what is loaded.
# Known attacks on Triton before 25.07 begin with them (CVE-2025-23319, 23320, 23334).
_GRPC_PROTOCOLS = "shared-memory,model-repository,trace,logging"
_HTTP_PROTOCOLS = _GRPC_PROTOCOLS
# What `TritonServer` sets, and what people set for NCCL and its transports, for ranks on other machines.
_REMOTE = ("LC_ALL", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONSAFEPATH")
_REMOTE_PREFIXES = ("NCCL_", "UCX_", "CUDA_")
Mode = Literal["single", "leader", "orchestrator"]


@dataclass(frozen=True)
class Deployment:
    """The processes that a repository needs.

    Attributes:
        world_size: ranks of one replica.
        replicas: copies of the engine that one tritonserver orchestrates.
        engine: the engine directory of a TensorRT engine; None for the embedded one, which starts its own ranks.
        servers: tritonservers side by side, each with all this on GPUs of its own.
        own_ranks: GPUs that an engine behind the python backend takes for its own ranks.
        vllm: the engine directory that a vLLM is started for next to each server; None for other engines.
    """

    world_size: int = 1
    replicas: int = 1
    engine: Path | None = None
    servers: int = 1
    own_ranks: int = 1
    vllm: Path | None = None

    @property
    def mode(self) -> Mode:
        if self.replicas > 1:
            return "orchestrator"
        return "leader" if self.world_size > 1 else "single"

    @property
    def gpus(self) -> int:
        """GPUs that each server needs."""
        return self.world_size * self.replicas * self.own_ranks


@dataclass(frozen=True)
class RankHosts:
    """The machines that the ranks of a TensorRT engine run on, this one first.

    Attributes:
        hosts: names that Open MPI reaches them by, with the number of ranks on each.
        shell: program that starts a command on another machine, `shell HOST COMMAND...`; None is ssh.
    """

    hosts: tuple[tuple[str, int], ...]
    shell: str | None = None

    @property
    def ranks(self) -> int:
        return sum(count for _, count in self.hosts)

    @property
    def here(self) -> int:
        """Ranks on this machine."""
        return self.hosts[0][1]


def rank_hosts(texts: Sequence[str], shell: str | None = None) -> RankHosts | None:
    """Parse machines given as HOST:RANKS; None if none is given.

    Raises:
        InputError: if a text has another form, or a machine is named twice.
    """
    hosts = []
    for text in texts:
        name, _, count = text.rpartition(":")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name) or not re.fullmatch(r"[1-9][0-9]{0,2}", count):
            raise InputError(f"{text!r} is not HOST:RANKS", "write it as node-1:4")
        hosts.append((name, int(count)))
    names = [name for name, _ in hosts]
    if len(set(names)) < len(names):
        raise InputError(
            f"the host {max(names, key=names.count)} is named twice", "name each once, with all its ranks"
        )
    if shell is not None and not hosts:
        raise InputError("--rank-shell is given without --rank-host", "name the hosts with --rank-host")
    return RankHosts(tuple(hosts), shell) if hosts else None


@dataclass(frozen=True)
class Endpoint:
    """A server's address and free TCP ports. Without an HTTP port, HTTP is off."""

    host: str
    http_port: int | None
    grpc_port: int
    metrics_port: int


@dataclass(frozen=True)
class Launch:
    """A command with what it needs in its environment, in addition to the caller's own.

    Attributes:
        tritonservers: how many of them run while the server is healthy.
        vllm: the command that starts the engine, for backend vllm; with `vllm_environment`.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    tritonservers: int
    vllm: tuple[str, ...] = ()
    vllm_environment: Mapping[str, str] = field(default_factory=dict)

    def shell(self) -> str:
        """Return the command as lines for a shell."""
        lines = [_line(self.vllm, self.vllm_environment) + " &"] if self.vllm else []
        return "\n".join([*lines, _line(self.command, self.environment)])


def _line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)])


def read_deployment(repository: Path) -> Deployment:
    """Read how many ranks and replicas a repository's engine has.

    Raises:
        InputError: if the config is broken or the engine is not where it says.
    """
    path = repository / ENGINE_MODEL / MODEL_CONFIG
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        raise InputError(f"{path}: is missing or not a model config", "write it again with `trtqwen repo`") from None
    if config.backend != _CPP_BACKEND:
        servers, engine = server_count(repository), Path(config.parameters["gpt_model_path"].string_value)
        found, ranks = read_engine_config(engine), 1
        if servers > 1:
            on_cpu = config.parameters["device"].string_value == "cpu"
            ranks = 0 if on_cpu else found.pretrained_config.mapping.world_size
        return Deployment(servers=servers, own_ranks=ranks, vllm=engine if found.starts_vllm else None)
    engine = Path(config.parameters["gpt_model_path"].string_value)
    world_size = read_engine_config(engine).pretrained_config.mapping.world_size
    missing = [rank for rank in range(world_size) if not (engine / rank_engine(rank)).is_file()]
    if missing:
        raise InputError(f"{engine}: {rank_engine(missing[0])} is missing", "build the engine again")
    return Deployment(world_size, replica_count(config), engine, server_count(repository))


def replica_count(config: ModelConfig) -> int:
    """Copies of the engine that one `tensorrt_llm` model runs: each has a group of GPUs of its own."""
    groups = config.parameters["gpu_device_ids"].string_value if "gpu_device_ids" in config.parameters else ""
    return len(groups.split(";"))


def python_instances(repository: Path) -> int:
    """Instances of python models in a finished repository; each takes shared memory."""
    count = 0
    for path in repository.glob(f"*/{MODEL_CONFIG}"):
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
        if config.backend == "python":
            count += sum(group.count for group in config.instance_group) or 1
    return count


def server_count(repository: Path) -> int:
    """How many tritonservers run a finished repository side by side.

    Raises:
        InputError: if the repository is not finished.
    """
    parameters = read_manifest(repository, "repository").parameters
    return int(parameters.get("replicas", 1)) if parameters.get("replica_mode") == "servers" else 1


def server_devices(
    deployment: Deployment, host: Host | None, gpus: Sequence[int] | None = None
) -> list[tuple[str, ...]]:
    """Return the GPUs of each server, as CUDA_VISIBLE_DEVICES names them; empty if a server uses all visible ones.

    Args:
        gpus: numbers of those to use; None is all that are visible.

    Raises:
        InputError: if fewer GPUs are visible than the servers need.
    """
    needed = deployment.servers * deployment.gpus
    python_backend = deployment.engine is None
    if gpus is not None and needed:
        if len(gpus) < needed:
            raise InputError(f"{len(gpus)} GPUs are named and the engine needs {needed}", "name as many GPUs")
        return [tuple(map(str, gpus[start : start + deployment.gpus])) for start in range(0, needed, deployment.gpus)]
    if host is None or not needed or (python_backend and (deployment.servers == 1 or not host.gpus)):
        return [()] * deployment.servers
    visible = len(host.visible_gpus)
    if visible < needed:
        replicas = deployment.servers * deployment.replicas
        raise InputError(
            f"{deployment.engine or 'the engine'}: needs {needed} GPUs (replicas: {replicas}, ranks of each: "
            f"{deployment.world_size * deployment.own_ranks}), and {visible} are visible",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES, or build with fewer replicas or ranks",
        )
    if deployment.servers == 1:
        return [()]
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in setting.split(",")] if setting else [str(gpu.index) for gpu in host.gpus]
    return [tuple(names[start : start + deployment.gpus]) for start in range(0, needed, deployment.gpus)]


def plan_launch(
    repository: Path,
    deployment: Deployment,
    binary: Path,
    endpoint: Endpoint,
    *,
    shm_prefix: str,
    drain_seconds: int,
    backends: Path | None = None,
    host: Host | None = None,
    devices: Sequence[str] = (),
    spread: RankHosts | None = None,
) -> Launch:
    """Plan the command.

    Args:
        shm_prefix: of the shared memory of python models; each rank appends its number.
        drain_seconds: how long a stopping server lets requests finish.
        backends: directory with Triton's backends, where they are not next to the program.
        host: the machine, for the environment that its GPUs need.
        devices: GPUs to restrict the server to, as CUDA_VISIBLE_DEVICES names them; all if there are none.
        spread: the machines of the ranks, as `check_spread` takes them; None is this one.
    """
    common = [
        str(binary),
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={drain_seconds}",
        *([f"--backend-directory={backends}"] if backends else []),
    ]
    leader = [
        *common,
        "--model-control-mode=none",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}0_",
        *_http(endpoint),
        f"--grpc-restricted-protocol={_restricted(_GRPC_PROTOCOLS)}",
        f"--grpc-address={endpoint.host}",
        f"--grpc-port={endpoint.grpc_port}",
        f"--metrics-address={endpoint.host}",
        f"--metrics-port={endpoint.metrics_port}",
    ]
    leader += _tracing()
    environment = _nccl_environment(deployment, host)
    if devices:
        # CUDA's GPU numbers are then those of nvidia-smi.
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if deployment.mode == "leader":
        ranks = [
            [
                *common,
                "--model-control-mode=explicit",
                f"--load-model={ENGINE_MODEL}",
                f"--backend-config=python,shm-region-prefix-name={shm_prefix}{rank}_",
                "--allow-http=false",
                "--allow-grpc=false",
                "--allow-metrics=false",
            ]
            for rank in range(1, deployment.world_size)
        ]
        machines = [] if spread is None else _machines(spread, environment)
        command = [*MPIRUN, *machines, "-n", "1", *leader]
        for rank_command in ranks:
            command += [":", "-n", "1", *rank_command]
        here = deployment.world_size if spread is None else spread.here
        return Launch(tuple(command), environment, here)
    if deployment.mode == "orchestrator":
        # The workers own the GPUs; what Triton itself would reserve on them is lost to the KV cache.
        leader += ["--pinned-memory-pool-byte-size=0", "--enable-peer-access=false"]
        leader += [f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(deployment.gpus)]
        environment |= {"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1"}
        leader = [*MPIRUN, "-n", "1", *leader]
    return Launch(tuple(leader), environment, 1)


def check_spread(deployment: Deployment, spread: RankHosts) -> None:
    """Raise an InputError unless a deployment's ranks can be spread over these machines."""
    if deployment.mode != "leader" or deployment.servers > 1:
        raise InputError(
            "ranks on several hosts are for one TensorRT engine of several ranks, and this repository has "
            f"{deployment.servers * deployment.replicas} replicas of {deployment.world_size} ranks of that kind",
            "serve each replica on its own host, and put `trtqwen gateway` in front of them",
        )
    if spread.ranks != deployment.world_size:
        raise InputError(
            f"the hosts are named for {spread.ranks} ranks and the engine has {deployment.world_size}",
            "name as many ranks as tp_size times pp_size",
        )


def _machines(spread: RankHosts, environment: Mapping[str, str]) -> list[str]:
    """Options of mpirun that start ranks on several machines.

    A rank gets the needed variables by name. A directory of this machine may not exist on others.
    """
    hosts = ",".join(f"{name}:{count}" for name, count in spread.hosts)
    options = ["--host", hosts, "--wdir", "/", "--mca", "plm_rsh_no_tree_spawn", "1"]
    if spread.shell is not None:
        options += ["--mca", "plm_rsh_agent", spread.shell]
    known = [name for name in os.environ if name.startswith(_REMOTE_PREFIXES) or name == "LD_LIBRARY_PATH"]
    for name in sorted({*_REMOTE, *known, *environment}):
        options += ["-x", name]
    return [*options, "-x", "TMPDIR=/tmp"]


def _http(endpoint: Endpoint) -> list[str]:
    if endpoint.http_port is None:
        return ["--allow-http=false"]
    return [
        f"--http-address={endpoint.host}",
        f"--http-port={endpoint.http_port}",
        f"--http-restricted-api={_restricted(_HTTP_PROTOCOLS)}",
    ]


def _restricted(protocols: str) -> str:
    """Protocols, and the header that a request for them needs.

    The command line of a process can be read by every user of the machine. So the header's value holds a line feed,
    which no header can carry: the protocols are closed to all.
    """
    return f"{protocols}:x-trtqwen={secrets.token_hex(16)}\n{secrets.token_hex(16)}"


def _tracing() -> list[str]:
    """Options that send Triton's part of each trace to where the standard variable of OpenTelemetry says."""
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint:
        return []
    settings = [
        f"opentelemetry,url={endpoint.rstrip('/')}/v1/traces",
        "opentelemetry,resource=service.name=trtqwen-triton",
    ]
    return [
        f"--trace-config={setting}" for setting in ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS", *settings)
    ]


def _nccl_environment(deployment: Deployment, host: Host | None) -> dict[str, str]:
    if deployment.world_size == 1 or host is None or "NCCL_P2P_DISABLE" in os.environ:
        return {}
    # Some drivers report peer access that GeForce cards do not have: ranks then hang or read wrong data.
    return {} if all(has_peer_to_peer(gpu.name) for gpu in host.gpus) else {"NCCL_P2P_DISABLE": "1"}

"""All tritonservers of a repository: each replica on ports and GPUs of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trtqwen.triton.launch import Launch, RankHosts, server_count
from trtqwen.triton.ports import Ports
from trtqwen.triton.server import TritonServer

PORT_STEP = 10  # between the ports of one replica and of the next


class TritonReplicas:
    """A tritonserver for each replica of a repository.

    Args:
        ports: of the first replica; each further one takes ports that are higher by `PORT_STEP`.
        verify, watchdog_seconds, gpus, spread: see `TritonServer`.
        log: of a single replica; several append their number, `triton-0.log` for `triton.log`.

    Raises:
        InputError, PortInUseError, ServerError: as `TritonServer` does.
    """

    def __init__(
        self,
        repository: Path,
        *,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        log: Path | None = None,
        drain_seconds: int = 30,
        verify: bool = True,
        watchdog_seconds: float = 0,
        gpus: Sequence[int] | None = None,
        spread: RankHosts | None = None,
    ) -> None:
        count = server_count(repository)
        self.servers = tuple(
            TritonServer(
                repository,
                ports=_replica_ports(ports or Ports(), index),
                host=host,
                log=log.with_name(f"{log.stem}-{index}{log.suffix}") if log and count > 1 else log,
                drain_seconds=drain_seconds,
                replica=index,
                verify=verify,
                watchdog_seconds=watchdog_seconds,
                gpus=gpus,
                spread=spread,
            )
            for index in range(count)
        )
        for index, server in enumerate(self.servers):
            server.name = f"replica {index}" if count > 1 else "Triton"

    @property
    def grpc_urls(self) -> tuple[str, ...]:
        return tuple(server.grpc_url for server in self.servers)

    def launches(self) -> list[Launch]:
        """The commands that `start` runs."""
        return [server.launch() for server in self.servers]


def _replica_ports(ports: Ports, index: int) -> Ports:
    shifted = {name: port + PORT_STEP * index for name, port in vars(ports).items() if port}
    return replace(ports, **shifted)

"""Triton servers for a batch, for engines that do not run in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trtqwen.gateway.generation.upstream import Replica
from trtqwen.triton.ports import Ports
from trtqwen.triton.replicas import TritonReplicas
from trtqwen.triton.server import TritonServer

_WATCHDOG_SECONDS = 60.0


class ServedTriton:
    """The servers of a repository, each replica on GPUs of its own.

    Attributes:
        addresses: of their gRPC endpoints.
    """

    def __init__(self, servers: Sequence[TritonServer]) -> None:
        self._servers = servers
        self.addresses = tuple(server.grpc_url for server in servers)

    def connect(self, address: str) -> Replica:
        """The gateway's connection to one of them."""
        return Replica(address)

    def check(self) -> None:
        """Raise a ServerError if one of them has ended or hangs."""
        for server in self._servers:
            server.check()


@contextmanager
def served_triton(repository: Path) -> Iterator[ServedTriton]:
    """Start the servers of a model repository, and stop them when the block ends.

    Raises:
        InputError: if the repository or its engine cannot be used.
        EngineError, ServerError: if a server does not start.
    """
    replicas = TritonReplicas(
        repository, ports=Ports(None, 0, 0), drain_seconds=1, watchdog_seconds=_WATCHDOG_SECONDS
    )
    with ExitStack() as started:
        for server in replicas.servers:
            started.callback(server.stop, drain=False)
            server.start()
        with ThreadPoolExecutor(len(replicas.servers)) as pool:
            list(pool.map(TritonServer.wait_until_ready, replicas.servers))
        yield ServedTriton(replicas.servers)

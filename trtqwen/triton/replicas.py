"""All tritonservers of a repository as one service: each replica on ports and GPUs of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from trtqwen.system.processes import Service
from trtqwen.triton.launch import Launch, server_count
from trtqwen.triton.server import Ports, TritonServer

PORT_STEP = 10  # between the ports of one replica and of the next


class TritonReplicas(Service):
    """A tritonserver for each replica of a repository, started, watched and stopped together.

    Args:
        ports: of the first replica; each further one takes ports that are higher by `PORT_STEP`.
        verify: see `TritonServer`.
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
            )
            for index in range(count)
        )

    @property
    def grpc_urls(self) -> tuple[str, ...]:
        return tuple(server.grpc_url for server in self.servers)

    def launches(self) -> list[Launch]:
        """The commands that `start` runs."""
        return [server.launch() for server in self.servers]

    def start(self) -> None:
        """Start every server; `wait_until_ready` tells when all serve."""
        for server in self.servers:
            server.start()

    def wait_until_ready(self) -> None:
        """Return when every model of every server is loaded.

        Raises:
            ServerError: at once when one of the servers ends instead.
        """
        self._at_once([server.wait_until_ready for server in self.servers])

    def check(self) -> None:
        """Raise a ServerError if one of the servers, or a part of one, has ended by itself."""
        for server in self.servers:
            server.check()

    def stop(self) -> None:
        """Let running requests finish on all servers at the same time, and end them. May be called again."""
        self._at_once([server.stop for server in self.servers], whatever_fails=True)

    def _at_once(self, actions: list[Callable[[], None]], *, whatever_fails: bool = False) -> None:
        """Run all actions in threads; raises the first failure, with `whatever_fails` after all have ended."""
        pool = ThreadPoolExecutor(len(actions))
        futures = [pool.submit(action) for action in actions]
        try:
            wait(futures, return_when="ALL_COMPLETED" if whatever_fails else FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False)  # what still waits for a server ends when that is stopped
        for future in futures:
            if future.done():
                future.result()


def _replica_ports(ports: Ports, index: int) -> Ports:
    shifted = {name: port + PORT_STEP * index for name, port in vars(ports).items() if port}
    return replace(ports, **shifted)

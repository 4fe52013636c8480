"""Limits of the gateway's connections and of their memory.

At a limit, the gateway closes the oldest idle connection and accepts the new one. A client that opens many
connections and sends nothing therefore blocks no other client.
"""

from __future__ import annotations

import ipaddress
import logging
import resource
import time
from collections import Counter, OrderedDict
from functools import lru_cache
from typing import Protocol

_RESERVED = 128  # files for everything but clients
_LOG_SECONDS = 60
_MOST_PARTIAL = 16 << 20  # bytes of unfinished headers, and of bodies behind a request that runs
_MOST_UNREAD = 128  # connections whose client does not read: each holds up to 64 KiB and one answer
_log = logging.getLogger(__name__)


class Connection(Protocol):
    """A counted connection.

    Attributes:
        held: bytes that it has sent and that no request has taken yet.
    """

    held: int

    def drop(self) -> None:
        """Close it immediately."""


class Connections:
    """Counts the connections of each address; IPv6 addresses count by their /64 networks.

    Args:
        most: connections in all.
        most_per_address: connections of one address.
        trusted: networks of proxies, whose connections are those of many clients.
    """

    def __init__(self, most: int, most_per_address: int, trusted: tuple[str, ...] = ()) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._trusted = trusted
        self._open = Counter[str]()
        self._idle: dict[str, OrderedDict[Connection, None]] = {}  # by address, the oldest first
        self._partial: OrderedDict[Connection, None] = OrderedDict()
        self._held = 0
        self._unread: OrderedDict[Connection, None] = OrderedDict()
        self._told_at = float("-inf")

    def enter(self, connection: Connection, address: str) -> bool:
        """Count a new connection of an address; False if a limit is reached and no connection is idle."""
        address = network_of(address)
        if self._open[address] >= self._most_per_address and not is_trusted(address, self._trusted):
            self._tell(f"{address} has {self._open[address]} connections, which is the most of one address")
            if not self._evict(address):
                return False
        elif self._open.total() >= self._most:
            self._tell(f"{self._open.total()} connections are open, which is the most")
            if not any(map(self._evict, sorted(self._idle, key=self._open.__getitem__, reverse=True))):
                return False
        self._open[address] += 1
        self.idle(connection, address)
        return True

    def leave(self, connection: Connection, address: str) -> None:
        """Count a closed connection of an address."""
        address = network_of(address)
        self.busy(connection, address)
        self.release(connection)
        self._unread.pop(connection, None)
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]

    def idle(self, connection: Connection, address: str) -> None:
        """Mark it as idle."""
        self._idle.setdefault(network_of(address), OrderedDict())[connection] = None

    def busy(self, connection: Connection, address: str) -> None:
        """Mark it as busy with a request."""
        address = network_of(address)
        mine = self._idle.get(address, OrderedDict())
        mine.pop(connection, None)
        if not mine:
            self._idle.pop(address, None)

    def hold(self, connection: Connection, count: int) -> None:
        """Count bytes that no request has taken yet; beyond the limit, the oldest connections are closed."""
        connection.held += count
        self._held += count
        self._partial[connection] = None
        while self._held > _MOST_PARTIAL:
            oldest, _ = self._partial.popitem(last=False)
            self._held -= oldest.held
            oldest.held = 0
            self._tell(f"unfinished requests hold {_MOST_PARTIAL >> 20} MiB; the oldest connections are closed")
            oldest.drop()

    def release(self, connection: Connection) -> None:
        """Count no unread bytes any more: a request has taken them."""
        if self._partial.pop(connection, self) is None:
            self._held -= connection.held
            connection.held = 0

    def unread(self, connection: Connection) -> None:
        """Mark a client that does not read. Beyond the limit, close the one that has not read for longest."""
        self._unread[connection] = None
        if len(self._unread) > _MOST_UNREAD:
            oldest, _ = self._unread.popitem(last=False)
            self._tell(f"more than {_MOST_UNREAD} clients do not read their answers; the oldest are closed")
            oldest.drop()

    def read(self, connection: Connection) -> None:
        """Mark a client that reads again."""
        self._unread.pop(connection, None)

    def _evict(self, address: str) -> bool:
        """Close the oldest idle connection of an address; False if it has none."""
        mine = self._idle.get(address)
        if not mine:
            return False
        oldest, _ = mine.popitem(last=False)
        if not mine:
            del self._idle[address]
        oldest.drop()
        return True

    def _tell(self, what: str) -> None:
        if time.monotonic() - self._told_at > _LOG_SECONDS:
            self._told_at = time.monotonic()
            _log.warning("%s", what)


def connection_limits(most: int, per_address: int | None, trusted: tuple[str, ...] = ()) -> Connections:
    """Limits, within what this process may open.

    Args:
        per_address: None is half of all.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        most = max(1, min(most, files - _RESERVED))
    return Connections(most, per_address or max(1, most // 2), trusted)


@lru_cache(4096)
def is_trusted(address: str, networks: tuple[str, ...]) -> bool:
    """Whether an address, or the network that it counts by, is in one of the networks."""
    try:
        network = ipaddress.ip_network(address)
        others = [ipaddress.ip_network(other) for other in networks]
    except ValueError:
        return False
    return any(network.version == other.version and network.subnet_of(other) for other in others)  # type: ignore[arg-type]


@lru_cache(4096)
def network_of(address: str) -> str:
    """What an address counts by: itself, or the /64 network of an IPv6 address, all of which one host may use."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address

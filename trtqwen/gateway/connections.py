"""How many connections the gateway keeps, in all and from one address."""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter

_RESERVED = 128  # files for everything but clients
_LOG_SECONDS = 60
_log = logging.getLogger(__name__)


class Connections:
    """Counts the connections of each address.

    Args:
        most: connections in all.
        most_per_address: connections of one address.
    """

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._open = Counter[str]()
        self._told_at = float("-inf")

    def enter(self, address: str) -> bool:
        """Count one more of an address; False if it has too many, or all together have."""
        total = self._open.total()
        if total >= self._most:
            self._tell(f"{total} connections are open, which is the most; new ones are closed at once")
            return False
        if self._open[address] >= self._most_per_address:
            self._tell(f"{address} has {self._open[address]} connections, which is the most of one address")
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Count one less of an address."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]

    def _tell(self, what: str) -> None:
        if time.monotonic() - self._told_at > _LOG_SECONDS:
            self._told_at = time.monotonic()
            _log.warning("%s", what)


def connection_limits(per_address: int | None) -> Connections:
    """Limits from how many files this process may open.

    Args:
        per_address: None is half of them.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (1 << 20 if files == resource.RLIM_INFINITY else files) - _RESERVED
    return Connections(most, per_address or max(1, most // 2))

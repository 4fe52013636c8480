"""Control channel from rank 0 to the other ranks: a Unix socket to each, with one message for each step."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from trtqwen.diagnostics import EngineError

_LENGTH = 4
_PATIENCE = 300.0  # seconds until every rank has started


class ControlChannel:
    """Messages from rank 0 to all others, in order.

    Args:
        path: of the socket.

    Raises:
        EngineError: if a rank does not connect.
    """

    def __init__(self, rank: int, size: int, path: Path) -> None:
        self._others: list[socket.socket] = []
        if rank == 0:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen(size)
                listener.settimeout(_PATIENCE)
                try:
                    self._others = [listener.accept()[0] for _ in range(size - 1)]
                except TimeoutError:
                    raise EngineError(f"not all of {size} ranks started within {_PATIENCE:g} s") from None
        else:
            self._rank_0 = _connect(path)

    def send(self, message: bytes) -> None:
        """Send from rank 0."""
        content = len(message).to_bytes(_LENGTH, "little") + message
        for other in self._others:
            other.sendall(content)

    def receive(self) -> bytes:
        """Receive the next message, on every other rank. Waits without a limit.

        Raises:
            EngineError: if rank 0 has ended.
        """
        return self._read(int.from_bytes(self._read(_LENGTH), "little"))

    def _read(self, size: int) -> bytes:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            count = self._rank_0.recv_into(view)
            if count == 0:
                raise EngineError("rank 0 has ended")
            view = view[count:]
        return bytes(content)


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + _PATIENCE
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise EngineError(f"rank 0 did not start within {_PATIENCE:g} s") from None
            time.sleep(0.01)

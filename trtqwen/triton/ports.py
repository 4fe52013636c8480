"""TCP ports of a server: checked, picked and kept until Triton takes them."""

from __future__ import annotations

import errno
import random
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace

from trtqwen.diagnostics import InputError, PortInUseError
from trtqwen.system.sockets import listen

_FREE_PORTS = range(16384, 32768)  # below those that Linux gives to outgoing connections while Triton loads


@dataclass(frozen=True)
class Ports:
    """TCP ports of a server; 0 picks a free one. Without a port, HTTP is off."""

    http: int | None = None
    grpc: int = 8001
    metrics: int = 8002


def claim(ports: Ports, host: str, held: ExitStack) -> Ports:
    """Check that every port is free, pick those that are 0, and reserve them while `held` is open."""
    for field in fields(ports):
        port = getattr(ports, field.name)
        if port is None:
            continue
        try:
            listener = held.enter_context(listen(host, port) if port else _listen_somewhere(host))
        except OSError as problem:
            held.close()
            if problem.errno != errno.EADDRINUSE:
                raise InputError(
                    f"{host}:{port}: cannot be listened on ({problem.strerror})", "choose another address or port"
                ) from None
            raise PortInUseError(
                f"{host}:{port}: is in use, but Triton's {field.name} endpoint needs it",
                f"stop what listens there or choose another with --{field.name}-port",
            ) from None
        ports = replace(ports, **{field.name: listener.getsockname()[1]})
    return ports


def _listen_somewhere(host: str) -> socket.socket:
    *others, last = random.sample(_FREE_PORTS, 50)
    for port in others:
        with suppress(OSError):
            return listen(host, port)
    return listen(host, last)

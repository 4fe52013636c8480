"""The gateway's listening socket. This module is separate, so that its users need not load the server."""

from __future__ import annotations

import socket

from trtqwen.diagnostics import InputError
from trtqwen.gateway.config import GatewayConfig
from trtqwen.system.sockets import listen


def bind(config: GatewayConfig) -> socket.socket:
    """A socket on the config's address; port 0 picks a free one.

    Raises:
        InputError: if the address is taken or not this machine's.
    """
    try:
        return listen(config.host, config.port)
    except OSError as problem:
        raise InputError(
            f"{config.host}:{config.port}: the gateway cannot listen there ({problem.strerror})",
            "stop the program that does, or choose another address or port",
        ) from None

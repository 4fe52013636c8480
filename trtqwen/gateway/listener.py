"""The socket that the gateway listens on; apart from the server, so that whoever starts one need not load it."""

from __future__ import annotations

import socket

from trtqwen.errors import InputError
from trtqwen.gateway.config import GatewayConfig


def bind(config: GatewayConfig) -> socket.socket:
    """A socket on the config's address; port 0 picks a free one.

    Raises:
        InputError: if the address is taken or not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen()  # bound alone, it would let others bind the same port
    except OSError as problem:
        listener.close()
        raise InputError(
            f"{config.host}:{config.port}: the gateway cannot listen there ({problem.strerror}); stop what does or "
            "choose another address or port"
        ) from None
    return listener

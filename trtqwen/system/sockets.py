"""Listening sockets and their addresses."""

from __future__ import annotations

import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a TCP address, IPv6 if it has colons; port 0 lets the system pick one.

    Raises:
        OSError: if the address is taken or not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # bound alone, it would let others bind the same port
    except OSError:
        listener.close()
        raise
    return listener


def reachable(host: str) -> str:
    """Return the address at which this machine reaches a listener."""
    return "127.0.0.1" if host == "0.0.0.0" else host

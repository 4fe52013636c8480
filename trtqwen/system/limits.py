"""Limits of this machine for a server, checked before its start, so that it does not fail under load."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from trtqwen.diagnostics import ServerError
from trtqwen.system.sockets import listen

FEWEST_FILES = 512  # Triton with its five models opens about 150; the gateway needs one for each connection
_SHARED_MEMORY = Path("/dev/shm")


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one, for this process and those it starts; returns it.

    Raises:
        ServerError: if even the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEWEST_FILES:
        raise ServerError(
            f"the limit of open files is {hard}, and a server needs {FEWEST_FILES} at least",
            "raise it with `ulimit -Hn`, or LimitNOFILE= of the systemd unit",
        )
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def check_shared_memory(needed: int) -> None:
    """Check that /dev/shm can be written and has room.

    Args:
        needed: bytes.

    Raises:
        ServerError: with the numbers.
    """
    hint = "enlarge it: `docker run --shm-size=1g`, or `mount -o remount,size=1g /dev/shm`"
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError as problem:
        raise ServerError(f"{_SHARED_MEMORY}: cannot be used ({problem.strerror})", "mount a tmpfs there") from None
    if not os.access(_SHARED_MEMORY, os.W_OK) or status.f_flag & os.ST_RDONLY:
        raise ServerError(f"{_SHARED_MEMORY}: cannot be written, and Triton's python models need it", hint)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        what = f"{_SHARED_MEMORY}: has {free / 1e6:.1f} MB free, and the models of this repository need "
        raise ServerError(f"{what}{needed / 1e6:.1f} MB", hint)


def check_loopback() -> None:
    """Check that a process reaches another one by 127.0.0.1: Triton, its clients and the ranks do.

    Raises:
        ServerError: if it does not.
    """
    try:
        with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=5):
            return
    except OSError as problem:
        raise ServerError(
            f"127.0.0.1 cannot be reached ({problem.strerror or problem})",
            "bring the loopback interface up: `ip link set lo up`",
        ) from None

"""Exchange about the table between the processes of one gateway: each writes a file and reads the others'."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtqwen.gateway.metrics import SHARED_DIRECTORY

_PREFIX = "models-"


class Peers:
    """Files in a directory that all processes of the gateway have.

    Args:
        supervisor: the supervisor's file; its directory is theirs too. None is the workers' own directory, if there
            are workers.
    """

    def __init__(self, supervisor: Path | None) -> None:
        shared = os.environ.get(SHARED_DIRECTORY)
        directory = supervisor.parent if supervisor is not None else Path(shared) if shared else None
        self._own = None if directory is None else directory / f"{_PREFIX}{os.getpid()}.json"

    def tell(self, content: Mapping[str, Any]) -> None:
        """Write this process's state."""
        if self._own is not None:
            with suppress(OSError):  # a full disk must not end a server
                partial = self._own.with_suffix(".new")
                partial.write_text(json.dumps({**content, "born": _born(os.getpid())}), encoding="utf-8")
                partial.replace(self._own)

    def others(self) -> list[dict[str, Any]]:
        """Read the state of the other processes."""
        return [] if self._own is None else told_in(self._own.parent, but=self._own)

    def leave(self) -> None:
        """Remove this process's file."""
        if self._own is not None:
            self._own.unlink(missing_ok=True)


def told_in(directory: Path, but: Path | None = None) -> list[dict[str, Any]]:
    """Read the state of a gateway's running processes."""
    told = []
    for path in directory.glob(f"{_PREFIX}*.json"):
        pid = path.stem.removeprefix(_PREFIX)
        if path != but and pid.isdecimal():
            with suppress(OSError, ValueError, KeyError):
                content = json.loads(path.read_text(encoding="utf-8"))
                if content["born"] == _born(int(pid)):  # not another process that has got its id
                    told.append(content)
    return told


def _born(pid: int) -> str:
    """Return the start time of a process, in the kernel's ticks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def forget_told(directory: Path) -> None:
    """Remove the files of a gateway that has ended."""
    for path in directory.glob(f"{_PREFIX}*.json"):
        path.unlink(missing_ok=True)

"""A worker of pytest-xdist that is forked from a process with its imports, which are most of what it computes else.

As a program, it takes the place of the worker's Python: it has the worker forked, and ends as it ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from types import ModuleType


def start() -> int:
    """Fork the worker, with this process's streams; returns its exit code."""
    ours, theirs = os.pipe()
    message = {"command": ["tests.forked_worker"], "env": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nursery:
        nursery.connect(os.environ["TRTQWEN_TEST_NURSERY"])
        socket.send_fds(nursery, [json.dumps(message).encode()], [0, 1, 2, theirs])
    for end in (0, 1, theirs):
        os.close(end)  # of the pipes to pytest, the worker alone holds these ends
    with open(ours, encoding="ascii") as told:
        told.readline()
        return int(told.readline() or 1)


def main() -> None:
    """Do as `python -c` with execnet's first line: run the program that comes on standard input."""
    sys.argv = ["-c"]
    sys.modules["__main__"] = ModuleType("__main__")  # what `multiprocessing` starts again: nothing
    exec(eval(sys.stdin.readline()), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    sys.exit(start())

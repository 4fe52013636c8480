"""A stand-in for Open MPI's mpirun, as far as trtqwen uses it: `mpirun OPTIONS -n 1 A ... : -n 1 B ...`.

Like the real one it gives every rank a process group of its own, and ends all when one fails; with STANDIN_MPI_BLIND
it does not notice, as happens when a rank's own launcher hangs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from types import FrameType


def remote(options: list[str]) -> list[list[str]]:
    """What starts each rank on its machine: nothing here, elsewhere the shell for ranks with the host."""
    if not options:
        return []
    shell = options[options.index("plm_rsh_agent") + 1]
    hosts = [entry.partition(":") for entry in options[options.index("--host") + 1].split(",")]
    return [
        [] if number == 0 else [shell, name]
        for number, (name, _, count) in enumerate(hosts)
        for _ in range(int(count))
    ]


def main() -> int:
    begin = sys.argv.index("-n")
    options, rest = sys.argv[1:begin], sys.argv[begin:]
    assert options[:4] == ["--allow-run-as-root", "--bind-to", "none", "--oversubscribe"]
    launchers = remote(options[4:])
    commands: list[list[str]] = [[]]
    for word in rest:
        if word == ":":
            commands.append([])
        else:
            commands[-1].append(word)
    ranks = []
    for rank, (option, count, *command) in enumerate(commands):
        assert (option, count) == ("-n", "1")
        environment = {**os.environ, "OMPI_COMM_WORLD_RANK": str(rank)}
        if launchers and launchers[rank]:
            command = [*launchers[rank], shlex.join(command)]  # a line for a shell, as ssh takes it
        ranks.append(subprocess.Popen(command, env=environment, preexec_fn=os.setpgrp))

    def end(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    while any(process.poll() is None for process in ranks):
        failed = [process for process in ranks if process.poll() not in (None, 0)]
        if failed and "STANDIN_MPI_BLIND" not in os.environ:
            for process in ranks:
                process.kill()
            return 1
        time.sleep(0.02)
    return max(abs(int(process.returncode)) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())

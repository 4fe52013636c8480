"""Runs one program and makes sure that nothing of it outlives its owner: `python -I -S guardian.py`.

The first line of standard input is a JSON object, the rest of it is empty: its end is the end of the owner, however
that came about (the kernel closes a killed process's pipes). Keys of the object:

    command, environment: the program, its arguments and all of its environment.
    directory: where it runs.
    niceness: how much other programs go before it where they want the same CPU; 0 to 19.
    orphaned: [signal, seconds] pairs: what the program gets when the owner has ended, and how long each may take.
    remove: directories to remove then, with what `ENVIRONMENTS` in them names.
    shared_memory: prefix of files in /dev/shm to remove then; may be empty.

Every descendant of the program, in any session, becomes a child of this process when its own
parent ends (PR_SET_CHILD_SUBREAPER) and is killed with the program. If this process itself is killed, the kernel
kills the program (PR_SET_PDEATHSIG). Signals to this process go to the program; its end is the program's end.

Uses the standard library's smallest modules alone, so that it takes 10 MB and starts in 30 ms.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
PARENT, STARTED = 1, 19  # fields of /proc/PID/stat, counted after the program's name
PYTHON_SHARED_MEMORY = "/dev/shm/psm_"
PYTHON_BACKEND = "/libtriton_python.so"  # mapped by the processes that have loaded it
# Triton's python backend makes an empty directory at its start, always in /tmp, and removes it at an
# orderly end. A file of this name says which were there before: {"before": [name], "since": Unix time}.
ENVIRONMENTS = "environments"
ENVIRONMENT_HOME, ENVIRONMENT_PREFIX = "/tmp", "python_env_"
ENVIRONMENT_SECONDS = 120  # from the start until the backend is loaded, at most


def main() -> None:
    """Run the program that standard input describes in one line of JSON, until it or standard input ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return
        line += piece
    spec = json.loads(line)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting: list[int] = []  # signals that came before the program was there
    for forwarded in FORWARDED:
        signal.signal(forwarded, lambda number, _: waiting.append(number))
    os.umask(0o077)
    program = start(spec, libc)
    for forwarded in FORWARDED:
        signal.signal(forwarded, lambda number, _: send(program, number))
    for number in waiting:
        send(program, number)
    status = watch(program, wake, owner=True)
    if status is None:
        for number, seconds in spec["orphaned"]:
            send(program, number)
            status = watch(program, wake, owner=False, seconds=seconds)
            if status is not None:
                break
        end_all()
        clear(spec)
        os._exit(0)
    end_all()
    if os.WIFSIGNALED(status):
        deadly = os.WTERMSIG(status)
        if deadly != signal.SIGKILL:
            signal.signal(deadly, signal.SIG_DFL)
        os.kill(os.getpid(), deadly)
    os._exit(os.WEXITSTATUS(status))


def start(spec: dict[str, Any], libc: ctypes.CDLL) -> int:
    """Start the program with what is left of our standard streams; returns its process id."""
    guardian = os.getpid()
    program = os.fork()
    if program:
        return program
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (*FORWARDED, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.chdir(spec["directory"])
        if spec["niceness"]:
            os.nice(spec["niceness"])
            # Linux may share the CPUs between sessions first, and looks at a session's own niceness.
            with suppress(OSError), open("/proc/self/autogroup", "w") as file:
                file.write(str(spec["niceness"]))
        os.execvpe(spec["command"][0], spec["command"], spec["environment"])
    except OSError as problem:
        print(f"{spec['command'][0]}: cannot be started ({problem.strerror})", file=sys.stderr, flush=True)
    os._exit(127)


def watch(program: int, wake: int, *, owner: bool, seconds: float = float("inf")) -> "int | None":
    """Wait for the program's end; returns its status, None if the owner ended or the time was over before.

    Args:
        owner: look at standard input.
    """
    deadline = time.monotonic() + seconds
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)  # the orphans of the program too
            except ChildProcessError:
                return 0
            if pid == program:
                return status
            if pid == 0:
                break
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        ready, _, _ = select.select([wake, 0] if owner else [wake], [], [], None if left == float("inf") else left)
        if wake in ready:
            os.read(wake, 4096)
        if 0 in ready and not os.read(0, 4096):
            return None


def send(pid: int, number: int) -> None:
    """Send a signal to a process, which may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def end_all() -> None:
    """Kill every descendant, until there is none, and remove the shared memory that they leave."""
    left: set[str] = set()
    while True:
        for pid in descendants():
            left |= shared_memory_of(pid)
            send(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            remove_files(left)
            return
        time.sleep(0.01)


def shared_memory_of(pid: int) -> "set[str]":
    """Files that Python's `multiprocessing` keeps in /dev/shm and a process maps: they outlive one that is killed."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/maps") as file:
        paths = (line[line.index("/") :].rstrip("\n") for line in file if PYTHON_SHARED_MEMORY in line)
        return {path for path in paths if path.startswith(PYTHON_SHARED_MEMORY) and not path.endswith(" (deleted)")}
    return set()


def remove_files(paths: "set[str]") -> None:
    """Remove files, some of which may be gone."""
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def descendants() -> "set[int]":
    """Return the ids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[PARENT])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    new = [os.getpid()]
    while new:
        new = [child for pid in new for child in children.get(pid, []) if child not in found]
        found.update(new)
    return found


def environments() -> "list[str]":
    """Names of the directories that python backends have made."""
    with suppress(OSError):
        return [name for name in os.listdir(ENVIRONMENT_HOME) if name.startswith(ENVIRONMENT_PREFIX)]
    return []


def remove_environments(record: str) -> None:
    """Remove the empty directories that a python backend has made since the file `record` was written.

    One that a Triton which still runs may have made stays: without it, that Triton aborts at its end.
    """
    try:
        with open(record) as file:
            content = json.load(file)
        before, since = set(content["before"]), float(content["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    starts = None
    for name in environments():
        path = os.path.join(ENVIRONMENT_HOME, name)
        with suppress(OSError):
            status = os.lstat(path)
            recent = since - 1 <= status.st_mtime <= since + ENVIRONMENT_SECONDS
            if name in before or not recent or status.st_uid != os.getuid():
                continue
            starts = backend_starts() if starts is None else starts
            if not any(start - 1 <= status.st_mtime <= start + ENVIRONMENT_SECONDS for start in starts):
                os.rmdir(path)


def backend_starts() -> "list[float]":
    """When each running process with Triton's python backend began, in Unix time."""
    found = []
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError, ValueError):
                with open(f"/proc/{entry}/maps") as file:
                    if PYTHON_BACKEND not in file.read():
                        continue
                with open(f"/proc/{entry}/stat") as file:
                    ticks = int(file.read().rpartition(")")[2].split()[STARTED])
                found.append(booted + ticks / os.sysconf("SC_CLK_TCK"))
    return found


def clear(spec: dict[str, Any]) -> None:
    """Remove what the owner would have removed."""
    import shutil

    for directory in spec["remove"]:
        remove_environments(os.path.join(directory, ENVIRONMENTS))
        shutil.rmtree(directory, ignore_errors=True)
    prefix = spec["shared_memory"]
    for name in os.listdir("/dev/shm") if prefix else ():
        if name.startswith(prefix):
            with suppress(OSError):
                os.unlink(os.path.join("/dev/shm", name))


if __name__ == "__main__":
    main()

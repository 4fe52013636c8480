"""The server's life: refused starts, failed loads, signals, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import numpy
import pytest

import trtqwen
from tests.slow import SLOW, slow
from tests.triton.conftest import Call, id_request, in_threads
from tests.waiting import GENEROUS
from trtqwen.artifact.manifest import read_manifest, write_manifest
from trtqwen.diagnostics import InputError, PortInUseError, ServerError
from trtqwen.doctor.endpoint import Endpoint
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.listener import bind
from trtqwen.recipe import ServeRecipe
from trtqwen.triton.ports import Ports
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

SERVE = """
import sys
from pathlib import Path
from trtqwen.triton.ports import Ports
from trtqwen.triton import server as module
from trtqwen.triton.server import TritonServer
from trtqwen.triton.supervisor import Supervisor
class Told(TritonServer):
    def start(self):
        super().start()
        print(self.pid, *map(repr, self.launch().command), flush=True)
log, patience = None, 2
if sys.argv[2:]:
    log, patience = Path(sys.argv[2]), 60
    module._UNLOAD_SECONDS = patience
server = Told(Path(sys.argv[1]), ports=Ports(0, 0, 0), drain_seconds=patience, log=log)
Supervisor([server], on_ready=lambda: print("ready", flush=True)).run()
"""


def family(group: int) -> dict[int, str]:
    """Living processes of a session, with their command lines."""
    processes = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == group and fields[0] != "Z":
                    processes[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return processes


def gone(group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while family(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def serving(
    repository: Path, log: Path | None = None, *, ready: bool = True
) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A process that serves until a signal, its server's session, and how its shared memory is called.

    Args:
        log: for Triton's output; the process then waits 60 s for what does not unload, otherwise 2 s.
    """
    arguments = [str(repository), *([str(log)] if log else [])]
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        while ready and (line := process.stdout.readline()) != "ready\n":
            words = line.split()  # a Triton that crashed by a fault of its own while it started is started again
        group = int(words[0])
        [prefix] = [word.strip("'").rpartition("=")[2] for word in words if "shm-region-prefix-name" in word]
        try:
            yield process, group, prefix
        finally:
            process.kill()
            for pid in family(group):
                os.kill(pid, signal.SIGKILL)


def test_a_taken_port_is_named_with_its_option(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"127.0.0.1:{port}: is in use.*--grpc-port"):
            TritonServer(repository, ports=Ports(0, port, 0))


def test_ports_are_kept_until_triton_takes_them(repository: Path) -> None:
    """Two sockets may be bound to one port as long as neither listens."""
    with pytest.raises(PortInUseError, match=r"127.0.0.1:18301: is in use.*--grpc-port"):
        TritonServer(repository, ports=Ports(18301, 18301, 0))
    server = TritonServer(repository, ports=Ports(0, 0, 0))
    with pytest.raises(PortInUseError):
        TritonServer(repository, ports=server.ports)
    with pytest.raises(InputError, match="the gateway cannot listen there"):
        bind(GatewayConfig(repository=repository, port=server.ports.grpc))
    server.stop()
    TritonServer(repository, ports=server.ports).stop()


def test_ports_picked_are_none_that_outgoing_connections_take(repository: Path) -> None:
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = TritonServer(repository, ports=Ports(0, 0, 0)).ports
    assert len({ports.http, ports.grpc, ports.metrics}) == 3
    assert max(ports.http or 0, ports.grpc, ports.metrics) < low


def test_an_unfinished_repository_is_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = Path(shutil.copytree(repository, tmp_path / "repository"))
    manifest = read_manifest(unfinished, "repository")
    (unfinished / "manifest.json").unlink()
    monkeypatch.setattr("trtqwen.artifact.manifest.__version__", "0.0.1")
    write_manifest(unfinished, "repository", manifest.inputs, manifest.parameters)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"was written by trtqwen 0\.0\.1, this is .*; write it again"):
        TritonServer(unfinished)
    (unfinished / "manifest.json").unlink()
    with pytest.raises(InputError, match="is not a finished repository"):
        TritonServer(unfinished)
    shutil.copy(repository / "manifest.json", unfinished)
    (unfinished / "tensorrt_llm" / "1" / "model.py").write_text("")
    with pytest.raises(InputError, match=r"model\.py has 0 bytes instead of"):
        TritonServer(unfinished)


@pytest.mark.triton
def test_a_model_that_does_not_load_is_told_at_once(bundled_engine: Callable[..., Path], tmp_path: Path) -> None:
    engine = Path(shutil.copytree(bundled_engine(), tmp_path / "engine"))
    write_repository(engine, ServeRecipe(), tmp_path / "repository")
    log = tmp_path / "triton.log"
    server = TritonServer(tmp_path / "repository", ports=Ports(0, 0, 0), log=log)
    shutil.rmtree(engine)
    server.start()
    group = server.pid
    said = rf"tensorrt_llm.*engine.*: is (not a finished engine|missing).* \(see {log}\)$"
    with pytest.raises(ServerError, match=said):
        server.wait_until_ready(60)
    server.stop()
    assert gone(group, 0)


@pytest.fixture
def other_python(tmp_path: Path) -> Path:
    """A Python that has our dependencies, but not trtqwen itself."""
    home = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    purelib = sysconfig.get_path("purelib", "venv", {"base": str(home)})
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin" / "python"


def serve_from(python: Path, repository: Path, path: Path) -> subprocess.CompletedProcess[str]:
    program = SERVE.replace('print("ready", flush=True)', "os.kill(os.getpid(), 15)").replace(
        "import sys", "import os, sys"
    )
    environment = {**os.environ, "PYTHONPATH": f"/nowhere{os.pathsep}{path}"}
    command = [str(python), "-c", program, str(repository)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=python.parent)


@SLOW
@pytest.mark.triton
def test_models_find_what_pythonpath_names(repository: Path, other_python: Path) -> None:
    """The python backend of 2.51 does not look at it: its interpreter is isolated."""
    done = serve_from(other_python, repository, Path(trtqwen.__file__).parents[1])
    assert done.returncode == 0, done.stderr


@pytest.mark.triton
def test_a_numpy_that_crashes_the_python_backend_is_named(repository: Path, other_python: Path) -> None:
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(other_python.parents[1])}))
    shutil.copytree(Path(numpy.__file__).parent, purelib / "numpy", copy_function=os.link)
    shutil.copytree(Path(numpy.__file__).parents[1] / "numpy.libs", purelib / "numpy.libs", copy_function=os.link)
    version = purelib / "numpy" / "version.py"
    text = version.read_text()
    version.unlink()
    version.write_text(text.replace(numpy.__version__, "2.5.2"))
    done = serve_from(other_python, repository, Path(trtqwen.__file__).parents[1])
    assert done.returncode != 0
    assert f"numpy 1, but {other_python.parents[1]} has numpy 2.5.2: run `" in done.stderr


@pytest.mark.slow
@pytest.mark.triton
def test_a_signal_stops_everything_cleanly(repository: Path, tmp_path: Path) -> None:
    """Also after answers that clients leave when they are over: Triton may keep their requests, and their model."""
    log = tmp_path / "triton.log"
    with serving(repository, log) as (process, group, prefix):
        commands = " ".join(family(group).values())
        assert "trtqwen.executor.worker" in commands
        assert "triton_python_backend_stub" in commands
        [port] = set(re.findall(r"--grpc-port=(\d+)", commands))
        leave_answers(f"127.0.0.1:{port}")
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert gone(group, 0)
        assert not list(Path("/dev/shm").glob(f"{prefix}*"))
    assert "successfully unloaded 'tensorrt_llm'" in log.read_text()


def leave_answers(url: str) -> None:
    """Have 100 requests refused by doctor's client, and 100 answered whose last token the gateway's leaves with."""
    for _ in range(100):
        with Endpoint(url, url) as endpoint, pytest.raises(ServerError, match="refused the request"):
            list(endpoint.tokens([5] * 600, 8))

    async def leave() -> None:
        replica = Replica(url)
        for number in range(100):
            replies = replica.generate(str(number), id_request([5, 6], 1), 60, carried=number % 2 == 0)
            async with aclosing(replies):
                async for reply in replies:
                    assert len(reply.token_ids) == 1
                    break
        await replica.close()

    asyncio.run(leave())


@pytest.mark.triton
@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT), slow(signal.SIGHUP)])
def test_a_signal_while_starting_stops_everything_too(repository: Path, number: signal.Signals) -> None:
    with serving(repository, ready=False) as (process, group, _):
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
        assert gone(group, 0)


@pytest.mark.slow
@pytest.mark.triton
def test_nothing_survives_when_we_are_killed(repository: Path) -> None:
    with serving(repository) as (process, group, _):
        process.kill()
        assert gone(group, 60)


@pytest.mark.slow
@pytest.mark.triton
def test_a_server_that_dies_is_noticed(repository: Path) -> None:
    with serving(repository) as (process, group, _):
        os.kill(group, signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        assert gone(group, 60)


@pytest.mark.triton
def test_a_dead_python_model_is_noticed_and_requests_fail_when_a_rank_is_killed(
    repository: Path, tmp_path: Path
) -> None:
    """Triton itself stays up, and starts neither again."""
    log = tmp_path / "triton.log"
    with TritonServer(repository, ports=Ports(0, 0, 0), drain_seconds=2, log=log) as server:
        server.check()
        [stub] = [pid for pid, command in family(server.pid).items() if "/preprocessing/1/model.py" in command]
        os.kill(stub, signal.SIGKILL)
        with pytest.raises(ServerError, match="a process of preprocessing has ended by itself: the log has no error"):
            deadline = time.monotonic() + GENEROUS
            while time.monotonic() < deadline:
                server.check()
                time.sleep(0.02)
        begun = threading.Event()

        def generate() -> str:
            replies = []
            for reply in Call(server, "tensorrt_llm", id_request([5, 6], 500, streaming=True)):
                begun.set()
                replies.append(reply)
            return replies[-1].error

        def kill() -> None:
            begun.wait(60)
            [rank] = [pid for pid, command in family(server.pid).items() if "trtqwen.executor.worker" in command]
            os.kill(rank, signal.SIGKILL)

        *errors, _ = in_threads([generate, generate, generate, kill])
        assert all("the engine has stopped (rank 0 ended with code -9" in error for error in errors)
        assert "the engine has stopped" in generate()
    assert "Waiting for in-flight requests to complete." not in log.read_text()  # on a dead engine, they would not

"""Attack a real server and say what held: kills, stops, hangs, signals, floods, corrupt bytes, hostile directories.

    python scripts/chaos.py             every case, about ten minutes on two idle cores
    python scripts/chaos.py --short     the cases that CI runs, about two minutes
    python scripts/chaos.py --only NAME one case

Prints a Markdown table, one line for each case, and exits with 1 if a case missed what it must hold. Every case
starts a server of its own on free loopback ports, with the bundled model; loads are bounded in count and time. After
a case that ends the server, nothing of it may remain: no process, no file in /dev/shm, no temporary directory.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIENT_SECONDS = 10  # every connected client has an answer or an error within this
WATCHDOG_SECONDS = 5
MEMORY_MB = 300  # of the gateway, in every attack
START_SECONDS = 240
RECIPE = "qwen2-tiny-cpu"
KEYS = {"alice": "alice-secret-key-0123456789", "bob": "bob-secret-key-0123456789abc"}


class Miss(Exception):
    """What a case must hold did not."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Miss(what)


def descendants(root: int) -> dict[int, str]:
    """Command lines of all descendants of a process, by process id."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry)] = int(fields[1])
    found: dict[int, str] = {}
    new = [root]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new and pid not in found]
        for pid in new:
            with suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").replace("\0", " ")
    return found


@dataclass
class Server:
    """`trtqwen serve` in a process of its own, and all that it has started."""

    repository: Path
    arguments: tuple[str, ...] = ()
    directory: Path | None = None
    temporary: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="chaos-")))
    pids: dict[int, str] = field(default_factory=dict)
    births: dict[int, str] = field(default_factory=dict)  # in ticks: the kernel gives the ids of the dead to others

    def start(self, *, ready: bool = True) -> Server:
        self.out, self.err = self.temporary / "out", self.temporary / "err"
        (self.temporary / "tmp").mkdir()
        command = [sys.executable, "-m", "trtqwen", "serve", f"--repo={self.repository}", "--json", "--grpc-port=0"]
        command += ["--metrics-port=0", "--gateway-port=0", f"--watchdog={WATCHDOG_SECONDS}", *self.arguments]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.directory,
                env={**os.environ, "TMPDIR": str(self.temporary / "tmp"), "PYTHONSAFEPATH": "1"},
            )
        if ready:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with suppress(ValueError):
                    self.info = json.loads(self.out.read_text())
                    break
                expect(self.process.poll() is None, f"serve ended: {self.err.read_text()[-300:]}")
                expect(time.monotonic() < deadline, "serve was not ready in time")
                time.sleep(0.1)
            self.port = int(self.info["gateway"].rpartition(":")[2])
        self.look()
        return self

    def look(self) -> None:
        """Remember every process that belongs to the server, whoever its parent is later."""
        for pid, command in descendants(self.process.pid).items():
            if (born := birth(pid)) is not None:
                self.pids[pid], self.births[pid] = command, born

    def lives(self, pid: int) -> bool:
        """Whether a process of the server still runs under this id."""
        return birth(pid) == self.births[pid]

    def shared_memory(self) -> list[str]:
        """The server's files in /dev/shm; other servers on this machine have others."""
        prefixes = {found for command in self.pids.values() for found in re.findall(r"=(trtqwen-\w+-)", command)}
        return [name for name in os.listdir("/dev/shm") if any(name.startswith(prefix) for prefix in prefixes)]

    def pid(self, text: str) -> int:
        self.look()
        return next(pid for pid, command in self.pids.items() if text in command and self.lives(pid))

    @property
    def memory(self) -> int:
        """Resident memory of the gateway in MB."""
        return int(Path(f"/proc/{self.pid('-m trtqwen.gateway')}/statm").read_text().split()[1]) * 4096 >> 20

    def get(self, path: str, timeout: float = 5) -> tuple[int | None, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as problem:
            return None, repr(problem)
        finally:
            connection.close()

    def ended(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Miss(f"serve still ran after {seconds:.0f} s") from None

    def remains(self, seconds: float = CLIENT_SECONDS) -> str:
        """What is left of an ended server after some seconds; empty if nothing is."""
        deadline = time.monotonic() + seconds
        while True:
            living = [pid for pid in self.pids if self.lives(pid)]
            shared = self.shared_memory()
            files = os.listdir(self.temporary / "tmp")
            left = [f"{len(living)} processes"] * bool(living) + shared + files
            if not left or time.monotonic() > deadline:
                return ", ".join(left)
            time.sleep(0.1)

    def clean(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        for pid in self.pids:
            with suppress(ProcessLookupError, PermissionError):
                if self.lives(pid):
                    os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


def birth(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


class Load:
    """Streams that run in threads; each ends with an answer or an error, at a time that is remembered."""

    def __init__(self, server: Server, count: int, max_tokens: int, key: str | None = None) -> None:
        self.ends: list[tuple[float, str]] = []
        self._threads = [
            threading.Thread(target=self._stream, args=(server, max_tokens, key), daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _stream(self, server: Server, max_tokens: int, key: str | None) -> None:
        says = "cut"
        try:
            status, text = ask(server, max_tokens=max_tokens, stream=True, ignore_eos=True, key=key, timeout=120)
            says = "done" if "[DONE]" in text else "error" if '"error"' in text or status != 200 else "cut"
        except (OSError, http.client.HTTPException):
            says = "cut"
        self.ends.append((time.monotonic(), says))

    def wait(self, since: float, seconds: float) -> str:
        """How the streams ended; a Miss if one had neither answer nor error in time."""
        for thread in self._threads:
            thread.join(max(0.0, since + seconds - time.monotonic()))
        open_ones = sum(thread.is_alive() for thread in self._threads)
        expect(not open_ones, f"{open_ones} clients still waited after {seconds:.0f} s")
        counts = {kind: sum(says == kind for _, says in self.ends) for kind in ("done", "error", "cut")}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def ask(server: Server, *, key: str | None = None, timeout: float = 60, **fields: Any) -> tuple[int, str]:
    body = {"model": server.repository.name, "messages": [{"role": "user", "content": "Tell me a story"}], **fields}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def kill(text: str | None, number: signal.Signals, code: int | None, seconds: float = 15) -> Callable[[Path], str]:
    """A process of the server, or serve itself, gets a signal under load."""

    def case(home: Path) -> str:
        server = Server(home / "repo").start()
        try:
            load = Load(server, 8, 900)
            time.sleep(2)
            server.look()
            begun = time.monotonic()
            os.kill(server.process.pid if text is None else server.pid(text), number)
            ended = server.ended(seconds)
            expect(code is None or ended == code, f"serve ended with {ended}, not {code}")
            took = time.monotonic() - begun
            clients = load.wait(begun, max(CLIENT_SECONDS, seconds))
            left = server.remains()
            expect(not left, f"left: {left}")
            return f"clients: {clients}; serve ended with {ended} after {took:.1f} s; nothing left"
        finally:
            server.clean()

    return case


def kill_while_loading(home: Path) -> str:
    server = Server(home / "repo").start(ready=False)
    try:
        time.sleep(2)
        server.look()
        server.process.kill()
        server.process.wait()
        left = server.remains()
        expect(not left, f"left: {left}")
        return "nothing left"
    finally:
        server.clean()


def second_signal(home: Path) -> str:
    server = Server(home / "repo").start()
    try:
        load = Load(server, 8, 900)
        time.sleep(2)
        server.look()
        server.process.send_signal(signal.SIGINT)
        time.sleep(1)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        server.ended(CLIENT_SECONDS)
        took = time.monotonic() - begun
        load.wait(begun, CLIENT_SECONDS)
        expect("press Ctrl-C again" in server.err.read_text(), "the first signal did not say how long it waits")
        left = server.remains()
        expect(not left, f"left: {left}")
        return f"ended {took:.1f} s after the second signal; nothing left"
    finally:
        server.clean()


def restart(home: Path) -> str:
    server = Server(home / "repo", ("--restart",)).start()
    try:
        os.kill(server.pid("executor.worker"), signal.SIGKILL)
        deadline = time.monotonic() + START_SECONDS
        red = False
        while True:
            status, text = server.get("/ready")
            red = red or status == 503
            if status == 200 and json.loads(text)["restarts"] == 1:
                break
            expect(time.monotonic() < deadline, f"not ready again: {status} {text}")
            time.sleep(0.1)
        expect(red, "/ready was never red")
        expect("trtqwen_gateway_restarts 1.0" in server.get("/metrics")[1], "the metrics do not count the restart")
        expect(ask(server, max_tokens=2)[0] == 200, "no answer after the restart")
        return "/ready red, then green; one restart counted; answers again"
    finally:
        server.clean()


def pipelining(home: Path) -> str:
    server = Server(home / "repo").start()
    try:
        before, sent, begun = server.memory, 0, time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection, suppress(OSError):
            while time.monotonic() - begun < 10 and sent < 50_000_000:
                connection.sendall(b"GET /health HTTP/1.1\r\n\r\n" * 2000)
                sent += 48_000
        after = server.memory
        expect(after < min(MEMORY_MB, before + 20), f"memory went from {before} to {after} MB")
        return f"{before} -> {after} MB"
    finally:
        server.clean()


def long_bodies(home: Path) -> str:
    server = Server(home / "repo").start()
    try:
        stop = time.monotonic() + 10
        big = "1" * 1_040_000

        def flood() -> None:
            while time.monotonic() < stop:
                with suppress(OSError, http.client.HTTPException):
                    ask(server, max_tokens=1, messages=[{"role": "user", "content": big}])

        threads = [threading.Thread(target=flood, daemon=True) for _ in range(30)]
        for thread in threads:
            thread.start()
        most = 0
        while time.monotonic() < stop:
            most = max(most, server.memory)
            time.sleep(0.2)
        for thread in threads:
            thread.join(30)
        expect(most < MEMORY_MB, f"the gateway took {most} MB")
        return f"at most {most} MB"
    finally:
        server.clean()


def reference_chain(home: Path) -> str:
    server = Server(home / "repo").start()
    try:
        parts: dict[str, Any] = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(1500)}
        schema = {"$defs": {**parts, "1500": {"type": "string"}}, "$ref": "#/$defs/0"}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        logged = len(server.err.read_text())
        status, _ = ask(server, max_tokens=4, response_format=form)
        expect(status == 400, f"status {status}")
        expect(len(server.err.read_text()) - logged < 1000, "a traceback was logged")
        return "400, no traceback"
    finally:
        server.clean()


def fair_share(home: Path) -> str:
    keys = home / "keys.yaml"
    keys.write_text(json.dumps({"keys": [{"name": name, "key": key} for name, key in KEYS.items()]}))
    keys.chmod(0o600)
    server = Server(home / "repo", (f"--api-keys={keys}",)).start()
    try:

        def latencies(seconds: float) -> list[float]:
            stop, times = time.monotonic() + seconds, []
            while time.monotonic() < stop:
                begun = time.monotonic()
                status, _ = ask(server, max_tokens=30, ignore_eos=True, key=KEYS["bob"])
                expect(status == 200, f"bob got {status}")
                times.append(time.monotonic() - begun)
            return sorted(times)

        alone = latencies(10)
        stop = time.monotonic() + 25

        def flood() -> None:
            while time.monotonic() < stop:
                with suppress(OSError, http.client.HTTPException):
                    ask(server, max_tokens=100, ignore_eos=True, key=KEYS["alice"])

        threads = [threading.Thread(target=flood, daemon=True) for _ in range(60)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        shared = latencies(15)
        for thread in threads:
            thread.join(60)
        before, after = alone[int(0.95 * len(alone))], shared[int(0.95 * len(shared))]
        expect(after <= 2 * before, f"p95 went from {before:.2f} to {after:.2f} s")
        return f"p95 alone {before:.2f} s, in the flood {after:.2f} s, {len(shared)} answers"
    finally:
        server.clean()


def admin_protocols(home: Path) -> str:
    server = Server(home / "repo", ("--http-port=0",)).start()
    try:
        host, _, port = server.info["http"].partition(":")
        for path in ("/v2/systemsharedmemory/region/x/register", "/v2/repository/index", "/v2/logging"):
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.request("POST", path, '{"key": "/x", "offset": 0, "byte_size": 1}')
            status = connection.getresponse().status
            expect(status == 403, f"{path}: {status}")
        modes = {oct(Path("/dev/shm", name).stat().st_mode & 0o777) for name in server.shared_memory()}
        expect(modes <= {"0o600"}, f"shared memory has modes {modes}")
        return "403 for each; shared memory 0600"
    finally:
        server.clean()


def hostile_directory(home: Path) -> str:
    place = home / "downloaded"
    place.mkdir(exist_ok=True)
    for name in ("numpy", "torch", "json", "trtqwen"):
        (place / f"{name}.py").write_text(f"open({str(place / 'RAN')!r}, 'a').write({name!r})\nraise SystemExit\n")
    server = Server(home / "repo", directory=place).start()
    try:
        expect(ask(server, max_tokens=2)[0] == 200, "no answer")
        expect(not (place / "RAN").exists(), "a module of the working directory ran")
        return "nothing of it ran"
    finally:
        server.clean()


def corrupt_bytes(home: Path) -> str:
    build(home / "copy")
    engine = home / "copy" / "engines" / RECIPE / "engine"
    for path in (engine / "rank0.safetensors", engine / "config.json", home / "copy" / "repo" / "manifest.json"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
        command = [sys.executable, "-m", "trtqwen", "serve", f"--repo={home / 'copy' / 'repo'}", "--grpc-port=0"]
        command += ["--metrics-port=0", "--gateway-port=0"]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
        expect(refused.returncode == 2, f"serve took a changed {path.name}: {refused.stderr[-200:]}")
        build(home / "copy", "--force")
    return "refused with exit code 2, repaired by build --force"


CASES: dict[str, tuple[bool, Callable[[Path], str]]] = {
    "kill -9 serve": (True, kill(None, signal.SIGKILL, -signal.SIGKILL)),
    "SIGHUP serve": (False, kill(None, signal.SIGHUP, 0, 45)),
    "kill -9 serve while it loads": (False, kill_while_loading),
    "kill -9 a rank": (True, kill("executor.worker", signal.SIGKILL, 1)),
    "kill -9 tritonserver": (False, kill("bin/tritonserver", signal.SIGKILL, 1)),
    "kill -9 a text model": (False, kill("preprocessing/1/model.py", signal.SIGKILL, 1)),
    "kill -9 the gateway": (False, kill("-m trtqwen.gateway", signal.SIGKILL, 1)),
    "kill -9 the guardian": (False, kill("guardian.py", signal.SIGKILL, 1)),
    "SIGSTOP a rank": (True, kill("executor.worker", signal.SIGSTOP, 1, WATCHDOG_SECONDS + 20)),
    "SIGSTOP tritonserver": (False, kill("bin/tritonserver", signal.SIGSTOP, 1, WATCHDOG_SECONDS + 20)),
    "SIGSTOP the gateway": (False, kill("-m trtqwen.gateway", signal.SIGSTOP, 1, WATCHDOG_SECONDS + 20)),
    "second Ctrl-C": (False, second_signal),
    "--restart after a dead rank": (True, restart),
    "pipelined requests, never read": (True, pipelining),
    "30 clients with a megabyte of digits": (False, long_bodies),
    "schema of 1,500 references": (False, reference_chain),
    "flood by one key": (False, fair_share),
    "Triton's admin protocols": (False, admin_protocols),
    "hostile working directory": (False, hostile_directory),
    "one changed bit in engine or repository": (True, corrupt_bytes),
}


def build(home: Path, *flags: str) -> None:
    model = Path(__file__).parents[1] / "trtqwen" / "demo" / "model"
    command = [sys.executable, "-m", "trtqwen", "build", RECIPE, f"--model={model}", f"--engines={home / 'engines'}"]
    subprocess.run([*command, f"--repo={home / 'repo'}", *flags], check=True, capture_output=True, timeout=300)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run the cases of CI")
    parser.add_argument("--only", choices=CASES, action="append", help="run this case; may be given again")
    options = parser.parse_args()
    chosen = {
        name: case
        for name, (short, case) in CASES.items()
        if (not options.only or name in options.only) and (short or not options.short)
    }
    misses = 0
    print("| case | held | what was seen | seconds |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="chaos-home-") as place:
        home = Path(place)
        build(home)
        for name, case in chosen.items():
            begun = time.monotonic()
            try:
                held, seen = "yes", case(home)
            except Miss as problem:
                held, seen = "**no**", str(problem).replace("\n", " ").replace("|", "/")
            except Exception as problem:
                held, seen = "**no**", f"the case itself failed: {problem!r}".replace("|", "/")
            misses += held != "yes"
            print(f"| {name} | {held} | {seen} | {time.monotonic() - begun:.0f} |", flush=True)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())

"""Attack a real server and say what held: kills, stops, hangs, signals, floods, corrupt bytes, hostile directories.

    python scripts/chaos.py             every case, less than 15 minutes on two idle cores
    python scripts/chaos.py --short     the cases that CI runs, about two minutes
    python scripts/chaos.py --only NAME one case

Prints a Markdown table, one line for each case, and exits with 1 if a case missed what it must hold. A case that ends
its server has one of its own, on free loopback ports and with the bundled model; attacks on the gateway share one.
Loads are bounded in count and time. After the end of a server nothing of it may remain: no process, no file in
/dev/shm, no temporary directory, no port that listens.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIENT_SECONDS = 10  # every connected client has an answer or an error within this
WATCHDOG_SECONDS = 5
HELPER_SECONDS = 20  # until a helper process that was stopped is replaced: its imports take seconds
MEMORY_MB = 300  # of the gateway, in every attack
START_SECONDS = 240
RECIPE = "qwen2-tiny-cpu"
MODEL = Path(__file__).parents[1] / "trtqwen" / "demo" / "model"
NOT_HERE = "not possible here: no namespaces of our own"
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
        self.environments = set(Path("/tmp").glob("python_env_*"))
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
                    info = json.loads(self.out.read_text())
                    if "gateway" in info:
                        self.info = info
                        break
                if self.process.poll() is not None or time.monotonic() > deadline:
                    said, ended = self.err.read_text()[-300:], self.process.poll()
                    self.look()
                    self.clean()
                    raise Miss(f"serve was not ready, code {ended}: {said}")
                time.sleep(0.1)
            self.port = int(self.info["gateway"].rpartition(":")[2])
        self.look()
        return self

    def look(self) -> None:
        """Remember every process that belongs to the server, regardless of later parents."""
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

    @property
    def listens(self) -> bool:
        """Whether one of its ports still takes connections."""
        urls = [url for url in self.info.values() if isinstance(url, str)] if hasattr(self, "info") else []
        ports = {int(found[1]) for url in urls if (found := re.search(r":(\d+)(?:/|$)", url))}
        for port in ports:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        return False

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
            files += [path.name for path in set(Path("/tmp").glob("python_env_*")) - self.environments if alone()]
            left = [f"{len(living)} processes"] * bool(living) + shared + files + ["a port"] * self.listens
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


def alone() -> bool:
    """Whether no other Triton runs on this machine, whose directories in /tmp would be taken for ours."""
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdecimal() and "tritonserver" in Path(f"/proc/{entry}/cmdline").read_text("utf-8", "replace"):
                return False
    return True


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


class Attacked:
    """One server with two keys for all attacks that it must survive; started by the first."""

    server: Server | None = None

    @classmethod
    def get(cls, home: Path) -> Server:
        if cls.server is None:
            keys = home / "keys.yaml"
            keys.write_text(json.dumps({"keys": [{"name": name, "key": key} for name, key in KEYS.items()]}))
            keys.chmod(0o600)
            cls.server = Server(home / "repo", (f"--api-keys={keys}",)).start()
        return cls.server

    @classmethod
    def end(cls) -> str:
        """Stop it; what is left."""
        if cls.server is None:
            return ""
        server, cls.server = cls.server, None
        try:
            server.look()
            server.process.terminate()
            server.ended(60)
            return server.remains()
        finally:
            server.clean()


def attack(run: Callable[[Server, float], None], seconds: float = 10, clients: int = 30) -> Callable[[Path], str]:
    """Clients that each call `run` until the time is over; memory and another key's answers are watched meanwhile."""

    def case(home: Path) -> str:
        server = Attacked.get(home)
        before, stop, most, answered = server.memory, time.monotonic() + seconds, 0, 0

        def again() -> None:
            while time.monotonic() < stop:
                with suppress(OSError, http.client.HTTPException):
                    run(server, stop)

        threads = [threading.Thread(target=again, daemon=True) for _ in range(clients)]
        for thread in threads:
            thread.start()
        slowest = 0.0
        while time.monotonic() < stop:
            most = max(most, server.memory)
            begun = time.monotonic()
            status, text = ask(server, key=KEYS["bob"], max_tokens=2, ignore_eos=True, timeout=30)
            expect(status == 200, f"the other key got {status}: {text[:100]}")
            slowest, answered = max(slowest, time.monotonic() - begun), answered + 1
        most = max(most, server.memory)
        for thread in threads:
            thread.join(30)
        expect(most < MEMORY_MB, f"the gateway took {most} MB")
        expect(slowest < CLIENT_SECONDS, f"the other key waited {slowest:.1f} s")
        return f"{before} -> at most {most} MB; another key: {answered} answers, the slowest {slowest:.2f} s"

    return case


def pipeline(path: str) -> Callable[[Server, float], None]:
    """One connection that sends requests and never reads."""

    def run(server: Server, stop: float) -> None:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            while time.monotonic() < stop:
                connection.sendall(request * 500)

    return run


def unfinished_headers(server: Server, stop: float) -> None:
    """A hundred connections with 30 KB of headers each that do not end."""
    with ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"X: " + b"x" * 30_000)
        time.sleep(max(0.0, min(2.0, stop - time.monotonic())))


def idle_connections(server: Server, stop: float) -> None:
    """Two hundred connections that send nothing."""
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
        time.sleep(max(0.0, min(2.0, stop - time.monotonic())))


def sends(**fields: Any) -> Callable[[Server, float], None]:
    """A request of alice with these fields."""

    def run(server: Server, stop: float) -> None:
        ask(server, key=KEYS["alice"], **fields)

    return run


def wrong_key(server: Server, stop: float) -> None:
    ask(server, key="wrong-secret-key-0123456789", timeout=5)


def hostile_schemas(home: Path) -> str:
    server = Attacked.get(home)
    chain: dict[str, Any] = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(1500)}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"anyOf": [deep, {"type": "null"}]}
    schemas = {
        "1,500 references": {"$defs": {**chain, "1500": {"type": "string"}}, "$ref": "#/$defs/0"},
        "anyOf 300 deep": deep,
        "a minimum of 4,200 digits": {"type": "integer", "minimum": int("9" * 4200)},
        "a pattern that counts to 100,000": {"type": "string", "pattern": "^(a{1,1000}){1,100}$"},
        "a loop": {"$ref": "#"},
    }
    logged, answers = len(server.err.read_text()), {}
    for name, schema in schemas.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status, text = ask(server, key=KEYS["alice"], max_tokens=4, response_format=form)
        answers[name] = status
        expect(status in (200, 400), f"{name}: {status} {text[:200]}")
    lines = [line for line in server.err.read_text()[logged:].splitlines() if not line.startswith("{")]
    expect(len(lines) <= len(schemas), f"{len(lines)} lines were logged: {lines[:1]}")
    return ", ".join(f"{name}: {status}" for name, status in answers.items())


def percentile(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, int(0.95 * len(times)))]


def fair(flood: Callable[[Server, float, int], None], clients: int) -> Callable[[Path], str]:
    """The p95 of one key's answers alone, and while another key floods."""

    def case(home: Path) -> str:
        server = Attacked.get(home)

        def latencies(seconds: float) -> list[float]:
            stop, times = time.monotonic() + seconds, []
            while time.monotonic() < stop:
                begun = time.monotonic()
                status, text = ask(server, max_tokens=30, ignore_eos=True, key=KEYS["bob"])
                expect(status == 200, f"bob got {status}: {text[:100]}")
                times.append(time.monotonic() - begun)
            return times

        latencies(2)
        alone = latencies(10)
        stop, number = time.monotonic() + 25, itertools.count()

        def again() -> None:
            while time.monotonic() < stop:
                with suppress(OSError, http.client.HTTPException):
                    flood(server, stop, next(number))

        threads = [threading.Thread(target=again, daemon=True) for _ in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        shared = latencies(15)
        for thread in threads:
            thread.join(60)
        before, after = percentile(alone), percentile(shared)
        expect(after <= 2 * before, f"p95 went from {before:.2f} to {after:.2f} s")
        return f"p95 alone {before:.2f} s, in the flood {after:.2f} s, {len(shared)} answers"

    return case


def many_answers(server: Server, stop: float, number: int) -> None:
    ask(server, max_tokens=100, ignore_eos=True, key=KEYS["alice"])


def heavy_schemas(server: Server, stop: float, number: int) -> None:
    """A legal schema with 400 optional properties, each time another one."""
    properties = {f"p{number}_{index}": {"type": ["string", "integer", "null"]} for index in range(400)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ask(server, max_tokens=8, key=KEYS["alice"], response_format=form)


def timing(home: Path) -> str:
    """A right guess of another key's prompt takes as long as a wrong one, where KV cache blocks are reused."""
    place = home / "reuse"
    place.mkdir(exist_ok=True)
    recipe = place / "reuse.yaml"
    text = (Path(__file__).parents[1] / "recipes" / f"{RECIPE}.yaml").read_text()
    recipe.write_text(text.replace("serve:\n", "serve:\n  enable_kv_cache_reuse: true\n"))
    command = [recipe if word == RECIPE else word for word in build_command(place)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    keys = place / "keys.yaml"
    keys.write_text(json.dumps({"keys": [{"name": name, "key": key} for name, key in KEYS.items()]}))
    keys.chmod(0o600)
    server = Server(place / "repo", (f"--api-keys={keys}",)).start()
    try:

        def seconds(key: str, text: str) -> float:
            begun = time.monotonic()
            messages = [{"role": "user", "content": text}]
            status, answer = ask(server, key=KEYS[key], max_tokens=1, ignore_eos=True, messages=messages)
            expect(status == 200, f"status {status}: {answer[:100]}")
            return time.monotonic() - begun

        own, right, wrong = [], [], []
        for round in range(7):
            prompt = " ".join(f"{round} secret {number}" for number in range(60))
            wrong.append(seconds("bob", f"not {prompt}"))
            seconds("alice", prompt)
            right.append(seconds("bob", prompt))
            own.append(seconds("alice", prompt))
        known, guessed, other = (sorted(times)[len(times) // 2] for times in (own, right, wrong))
        expect(known < 0.7 * other, f"one's own prompt takes {known:.3f} s, another {other:.3f} s: nothing is reused")
        expect(guessed > 0.7 * other, f"a right guess takes {guessed:.3f} s, a wrong one {other:.3f} s")
        return f"right guess {guessed:.3f} s, wrong guess {other:.3f} s, one's own prompt again {known:.3f} s"
    finally:
        server.clean()


def frozen(text: str, **fields: Any) -> Callable[[Path], str]:
    """A helper process is stopped: the next request still has its answer."""

    def case(home: Path) -> str:
        server = Attacked.get(home)
        expect(ask(server, key=KEYS["bob"], max_tokens=4, **fields)[0] == 200, "no answer before")
        server.look()
        helpers = [pid for pid, command in server.pids.items() if text in command and server.lives(pid)]
        expect(bool(helpers), f"no process of {text}")
        for pid in helpers:
            os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        status, answer = ask(server, key=KEYS["bob"], max_tokens=4, **_varied(fields))
        took = time.monotonic() - begun
        expect(status == 200, f"status {status}: {answer[:100]}")
        expect(took < HELPER_SECONDS, f"the answer took {took:.1f} s")
        return f"answered after {took:.1f} s by new processes"

    return case


def _varied(fields: dict[str, Any]) -> dict[str, Any]:
    """Another guide: one that was tried before is not tried again."""
    return {**fields, "guided_regex": "(yes|no|maybe)"} if "guided_regex" in fields else fields


def worker(home: Path) -> str:
    """Of two gateway workers one is killed, then one is stopped; a new one takes its place."""
    settings = home / "gateway.yaml"
    settings.write_text("workers: 2\n")
    server = Server(home / "repo", (f"--gateway-config={settings}",)).start()
    try:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            first = min(_workers(server))
            server.look()
            os.kill(first, number)
            deadline = time.monotonic() + 30
            while server.lives(first) or len(_workers(server)) < 2 or ask_quietly(server) != 200:
                expect(time.monotonic() < deadline, f"no new worker after {number.name}")
                expect(server.process.poll() is None, f"serve ended after {number.name}")
                time.sleep(0.2)
        return "both replaced; answers go on"
    finally:
        server.clean()


def _workers(server: Server) -> list[int]:
    gateways = [pid for pid, command in descendants(server.process.pid).items() if "-m trtqwen.gateway" in command]
    return [
        pid
        for pid in gateways
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] in map(str, gateways)
    ]


def ask_quietly(server: Server) -> int | None:
    with suppress(OSError, http.client.HTTPException):
        return ask(server, max_tokens=2, timeout=5)[0]
    return None


def isolated(prepare: str, command: list[str]) -> tuple[int, str] | None:
    """Run a command in a mount namespace of its own after some preparation; None where that is not allowed."""
    shell = f"{prepare} || exit 99; exec {shlex.join(command)}"
    try:
        done = subprocess.run(
            ["unshare", "--mount", "--map-root-user", "sh", "-c", shell], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return (-1, str(problem)) if isinstance(problem, subprocess.TimeoutExpired) else None
    return None if done.returncode == 99 or "unshare" in done.stderr else (done.returncode, done.stderr)


def full_disk(home: Path) -> str:
    """A build on a disk of 2 MB."""
    disk = home / "disk"
    disk.mkdir(exist_ok=True)
    command = build_command(disk)
    check = f"mount -t tmpfs -o size=2m tmpfs {disk}"
    shell = ["sh", "-c", f"{shlex.join(command)}; code=$?; find {disk} -name '*.tmp' >&2; exit $code"]
    done = isolated(check, shell)
    if done is None:
        return NOT_HERE
    code, said = done
    expect(code in (1, 2), f"code {code}: {said[-200:]}")
    expect("space" in said and "Traceback" not in said and ".tmp" not in said, said[-300:])
    return f"exit code {code}, nothing left: {said.strip().splitlines()[0][:100]}"


def tiny_shared_memory(home: Path) -> str:
    """A /dev/shm of 1 MB."""
    done = isolated("mount -t tmpfs -o size=1m tmpfs /dev/shm", serve_command(home / "repo"))
    if done is None:
        return NOT_HERE
    code, said = done
    expect(code == 1 and "/dev/shm" in said and "Traceback" not in said, f"code {code}: {said[-300:]}")
    return f"exit code 1: {said.strip().splitlines()[-2][:100]}"


def no_network(home: Path) -> str:
    """A network namespace whose loopback interface is down."""
    command = ["unshare", "--net", "--map-root-user", *serve_command(home / "repo")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except OSError:
        return NOT_HERE
    if "unshare" in done.stderr:
        return NOT_HERE
    expect(done.returncode in (1, 2), f"code {done.returncode}")
    expect("loopback" in done.stderr and "gloo" not in done.stderr.lower(), done.stderr[-300:])
    return f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-2][:100]}"


def hostile_templates(home: Path) -> str:
    """Models whose chat templates loop, multiply or are broken."""
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    double = "{% set n = namespace(x='0123456789') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    codes = []
    for number, template in enumerate((loop, double, "{{ %}")):
        model = home / f"model{number}"
        shutil.copytree(MODEL, model, dirs_exist_ok=True)
        (model / "chat_template.jinja").write_text(template)
        command = build_command(home / f"hostile{number}", model)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        codes.append(done.returncode)
        expect(
            done.returncode == 2 and "chat template" in done.stderr, f"code {done.returncode}: {done.stderr[-200:]}"
        )
        expect("Traceback" not in done.stderr, done.stderr[-200:])
    return f"build refuses each with exit codes {codes}"


def restart_gateway(home: Path) -> str:
    server = Server(home / "repo", ("--restart",)).start()
    try:
        for text in ("-m trtqwen.gateway", "bin/tritonserver"):
            os.kill(server.pid(text), signal.SIGKILL)
            deadline = time.monotonic() + START_SECONDS
            time.sleep(1)
            while ask_quietly(server) != 200:
                expect(server.process.poll() is None, f"serve ended: {server.err.read_text()[-300:]}")
                expect(time.monotonic() < deadline, f"no answer after the end of {text}")
                time.sleep(0.2)
        return "gateway, then Triton: answers again"
    finally:
        server.clean()


def crash(home: Path) -> str:
    """Triton crashes: the cause is not said to be memory."""
    server = Server(home / "repo").start()
    try:
        os.kill(server.pid("bin/tritonserver"), signal.SIGSEGV)
        code = server.ended(30)
        said = server.err.read_text()
        expect(code == 1 and "memory" not in said and "SIGSEGV" in said, f"code {code}: {said[-300:]}")
        left = server.remains()
        expect(not left, f"left: {left}")
        return "exit code 1; the cause is SIGSEGV, not memory; nothing left"
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
    repo = home / "copy" / "repo"
    places = [engine / "rank0.safetensors", engine / "config.json", repo / "manifest.json"]
    for path in (*places, repo / "tensorrt_llm" / "config.pbtxt"):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        path.write_bytes(changed)
        refused = subprocess.run(serve_command(repo), capture_output=True, text=True, timeout=120)
        expect(refused.returncode == 2, f"serve took a changed {path.name}: {refused.stderr[-200:]}")
        path.write_bytes(content if path is not places[0] else changed)
    build(home / "copy", "--force")
    repaired = [sys.executable, "-m", "trtqwen", "serve", f"--repo={repo}", "--dry-run"]
    expect(
        subprocess.run(repaired, capture_output=True, timeout=120).returncode == 0, "build --force repaired nothing"
    )
    return "each refused with exit code 2, repaired by build --force"


REGEX = {"guided_regex": "(yes|no)"}
MANY = {"messages": [{"role": "user", "content": "hi"}] * 20_000}
CASES: dict[str, tuple[bool, Callable[[Path], str]]] = {
    "kill -9 serve": (True, kill(None, signal.SIGKILL, -signal.SIGKILL)),
    "SIGHUP serve": (False, kill(None, signal.SIGHUP, 0, 45)),
    "kill -9 serve while it loads": (False, kill_while_loading),
    "kill -9 one rank": (True, kill("executor.worker", signal.SIGKILL, 1)),
    "kill -9 tritonserver": (False, kill("bin/tritonserver", signal.SIGKILL, 1)),
    "tritonserver crashes": (False, crash),
    "kill -9 a text model": (False, kill("preprocessing/1/model.py", signal.SIGKILL, 1)),
    "kill -9 the gateway": (False, kill("-m trtqwen.gateway", signal.SIGKILL, 1)),
    "kill -9 and SIGSTOP one of two workers": (False, worker),
    "kill -9 the guardian": (False, kill("guardian.py", signal.SIGKILL, 1)),
    "SIGSTOP one rank": (True, kill("executor.worker", signal.SIGSTOP, 1, WATCHDOG_SECONDS + 20)),
    "SIGSTOP tritonserver": (False, kill("bin/tritonserver", signal.SIGSTOP, 1, WATCHDOG_SECONDS + 20)),
    "SIGSTOP the gateway": (False, kill("-m trtqwen.gateway", signal.SIGSTOP, 1, WATCHDOG_SECONDS + 20)),
    "second Ctrl-C": (False, second_signal),
    "--restart after a dead rank": (True, restart),
    "--restart after a dead gateway and Triton": (False, restart_gateway),
    "requests pipelined, never read": (True, attack(pipeline("/health"), clients=4)),
    "metrics pipelined, never read": (False, attack(pipeline("/metrics"), clients=4)),
    "3,000 connections with unfinished headers": (False, attack(unfinished_headers)),
    "6,000 idle connections": (False, attack(idle_connections)),
    "wrong keys": (False, attack(wrong_key)),
    "bodies of a megabyte: digits": (True, attack(sends(messages=[{"role": "user", "content": "1" * 1_040_000}]))),
    "bodies of a megabyte: 20,000 messages": (False, attack(sends(**MANY))),
    "bodies of a megabyte: an ignored field of lists": (False, attack(sends(max_tokens=50, ignored=[[]] * 200_000))),
    "a bias for each waiting request": (False, attack(sends(max_tokens=50, logit_bias={"5": 1}), clients=60)),
    "hostile schemas": (False, hostile_schemas),
    "SIGSTOP the guides' processes": (False, frozen("guide_compiler", **REGEX)),
    "SIGSTOP the templates' processes": (False, frozen("template_process")),
    "a guess of another key's prompt": (False, timing),
    "flood by one key": (False, fair(many_answers, 60)),
    "40 heavy schemas of one key": (False, fair(heavy_schemas, 40)),
    "Triton's admin protocols": (False, admin_protocols),
    "hostile working directory": (False, hostile_directory),
    "hostile chat templates": (False, hostile_templates),
    "one changed bit in engine or repository": (True, corrupt_bytes),
    "full disk": (False, full_disk),
    "/dev/shm of 1 MB": (False, tiny_shared_memory),
    "no network": (False, no_network),
}


def build_command(home: Path, model: Path | None = None, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "trtqwen", "build", RECIPE, f"--model={model or MODEL}"]
    return [*command, f"--engines={home / 'engines'}", f"--repo={home / 'repo'}", *flags]


def serve_command(repository: Path) -> list[str]:
    command = [sys.executable, "-m", "trtqwen", "serve", f"--repo={repository}", "--grpc-port=0"]
    return [*command, "--metrics-port=0", "--gateway-port=0"]


def build(home: Path, *flags: str) -> None:
    subprocess.run(build_command(home, None, *flags), check=True, capture_output=True, timeout=300)


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
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("| case | passed | observed | seconds |\n| --- | --- | --- | --- |")
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
        left = Attacked.end()
        misses += bool(left)
        if left:
            print(f"| the end of the attacked server | **no** | left: {left} | |", flush=True)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())

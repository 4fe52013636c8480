"""Load a real server for minutes or hours, disturb it, and fail on a leak, a hang or a lost request.

    python scripts/soak.py --minutes 30 --rate 1
    python scripts/soak.py --minutes 480 --rate 5 --workers 2 --json soak.json
    python scripts/soak.py --minutes 10 --rate 8 --set checkpoint.tp_size=1 --set checkpoint.dtype=float16  # one GPU

Starts `trtqwen serve --restart` with the bundled model. Clients send chats, completions, messages and plain requests,
whole and streamed; some leave in mid-answer, some before the first byte, some stop in mid-request, and some send what
must be refused. In the first half, processes are killed and stopped in turn: the worker of rank 0, the gateway,
tritonserver. In the second half the processes live undisturbed, and their memory and descriptors are judged.

Exits with 1 if one of these does not hold:

- sent = answered + refused + failed + left: no request ends without a word, and none waits longer than --hang.
- Requests fail only while a killed process is away, and the service comes back each time.
- Nothing grows: in the second half, the private memory of each service, all its processes together, does not rise by
  more than --leak with a confidence of 95 %, and its descriptors and threads do not increase.
- When the load is over, nothing is in flight or queued, no KV cache block is in use, and as many temporary files and
  files in /dev/shm exist as before. When the server has stopped, nothing of it is left.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.chaos import START_SECONDS, Miss, Server, birth, build

End = Literal["answered", "refused", "failed", "left", "lost", "hung"]
ENDS: tuple[End, ...] = ("answered", "refused", "failed", "left", "lost", "hung")
WARM_SECONDS = 60.0  # of a process's life, in which its caches fill
LEAST_SAMPLES = 30  # for a slope
BLOCKS = 10  # of samples, each of which is one point for the slope
GROWTH_MB, GROWTH_SHARE = 4.0, 0.03  # what a service may gain in the second half, the larger of both
MORE_DESCRIPTORS, MORE_THREADS = 8, 8
GRACE_SECONDS = 3.0  # after the service is ready again, for what was begun before
VICTIMS = (
    ("rank", "executor.worker", signal.SIGKILL),
    ("gateway", "-m trtqwen.gateway", signal.SIGKILL),
    ("tritonserver", "bin/tritonserver", signal.SIGKILL),
    ("rank stopped", "executor.worker", signal.SIGSTOP),
    ("text model", "preprocessing/1/model.py", signal.SIGKILL),
)
ROLES = {
    "guardian.py": "guardian",
    "-m trtqwen.gateway": "gateway",
    "executor.worker": "rank",
    "bin/tritonserver": "tritonserver",
    "preprocessing/1/model.py": "preprocessing",
    "postprocessing/1/model.py": "postprocessing",
    "tensorrt_llm_bls/1/model.py": "tensorrt_llm_bls",
    "tensorrt_llm/1/model.py": "tensorrt_llm",
    "trtqwen serve": "serve",
}


@dataclass(frozen=True)
class Outcome:
    """How one request ended.

    Attributes:
        kind: what the client did.
        begun, ended: seconds of the monotonic clock.
        detail: what the server said, or what broke.
    """

    kind: str
    end: End
    begun: float
    ended: float
    detail: str = ""


@dataclass(frozen=True)
class Away:
    """From a kill to the time when the service was ready again."""

    victim: str
    begun: float
    ended: float

    def covers(self, outcome: Outcome) -> bool:
        return outcome.begun <= self.ended + GRACE_SECONDS and outcome.ended >= self.begun


@dataclass(frozen=True)
class Sample:
    """One look at a process.

    Attributes:
        at: seconds of the monotonic clock.
        megabytes: memory that it shares with no other process and no file.
    """

    at: float
    megabytes: float
    descriptors: int
    threads: int


@dataclass
class Life:
    """A process from its first look to its last."""

    role: str
    pid: int
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What the processes of one service say about leaks; `problems` is empty if nothing.

    Attributes:
        processes: those that lived through all of the time that counts.
        megabytes, descriptors, threads: of all of them, in the first and the last third of that time.
        slope: of their memory in MB an hour, with its 95 % confidence interval; None if the time was too short.
    """

    role: str
    processes: int
    minutes: float
    megabytes: tuple[float, float]
    slope: tuple[float, float, float] | None
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    problems: tuple[str, ...]


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The median of the slopes between all pairs of points, and the ends of its 95 % confidence interval.

    Theil 1950 and Sen 1968; outliers do not move it. The interval counts on points that vary independently.
    """
    slopes = sorted(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for index, earlier in enumerate(points)
        for later in points[index + 1 :]
        if later[0] > earlier[0]
    )
    count, pairs = len(points), len(slopes)
    if not pairs:
        return 0.0, float("-inf"), float("inf")
    width = 1.96 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)  # of Kendall's statistic
    low, high = math.floor((pairs - width) / 2), math.ceil((pairs + width) / 2)
    ends = slopes[low] if low >= 0 else float("-inf"), slopes[high] if high < pairs else float("inf")
    return (median(slopes), *ends)


def in_blocks(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The medians of ten parts of the time: an allocator's swings make neighbors alike, but not the parts."""
    edges = [round(number * len(points) / BLOCKS) for number in range(BLOCKS + 1)]
    parts = [points[start:stop] for start, stop in itertools.pairwise(edges)]
    return [(median(at for at, _ in part), median(value for _, value in part)) for part in parts]


def judge_service(lives: Sequence[Life], since: float, leak: float) -> Verdict:
    """Whether the processes of one service leak, all together: a client's requests move between them.

    Memory leaks if it surely rises by more than `leak` in an hour, by more than caches and allocators vary, and still
    does so in the last half of the time: what fills up once is no leak.

    Args:
        since: the part of the run that counts begins then; a process's first minute never counts.
        leak: MB in an hour.
    """
    end = max(life.samples[-1].at for life in lives)
    left = [life for life in lives if life.samples[-1].at == end]
    begin = max(since, *(life.samples[0].at + WARM_SECONDS for life in left))
    looks = _together(left, begin)
    minutes = (end - min(life.samples[0].at for life in left)) / 60
    problems = []
    counts: dict[str, tuple[int, int]] = {}
    if len(looks) < LEAST_SAMPLES:
        looks, rate = _together(left, float("-inf")), None
        first, last = looks[:1], looks[-1:]
    else:
        first, last = looks[: len(looks) // 3], looks[-(len(looks) // 3) :]
        points = [(look.at, look.megabytes) for look in looks]
        rate = slope(in_blocks(points))
        late, *_ = slope(points[len(points) // 2 :])
        growth = rate[0] * (points[-1][0] - points[0][0])
        before = median(look.megabytes for look in first)
        if growth > max(GROWTH_MB, GROWTH_SHARE * before) and rate[1] * 3600 > leak and late * 3600 > leak / 2:
            low, high = rate[1] * 3600, rate[2] * 3600
            problems.append(f"memory grows by {rate[0] * 3600:.1f} MB/h ({low:.1f} to {high:.1f})")
    for name, most in (("descriptors", MORE_DESCRIPTORS), ("threads", MORE_THREADS)):
        pair = tuple(int(median(getattr(look, name) for look in part)) for part in (first, last))
        counts[name] = pair[0], pair[1]
        if rate is not None and pair[1] - pair[0] > most:
            problems.append(f"{name} went from {pair[0]} to {pair[1]}")
    sizes = [median(look.megabytes for look in part) for part in (first, last)]
    return Verdict(
        left[0].role,
        len(left),
        minutes,
        (sizes[0], sizes[1]),
        None if rate is None else (rate[0] * 3600, rate[1] * 3600, rate[2] * 3600),
        counts["descriptors"],
        counts["threads"],
        tuple(problems),
    )


def _together(lives: Sequence[Life], begin: float) -> list[Sample]:
    """The sums of all processes at the looks that saw each of them, from a time on."""
    seen: dict[float, list[Sample]] = {}
    for life in lives:
        for sample in life.samples:
            if sample.at >= begin:
                seen.setdefault(sample.at, []).append(sample)
    return [
        Sample(
            at,
            sum(sample.megabytes for sample in samples),
            sum(sample.descriptors for sample in samples),
            sum(sample.threads for sample in samples),
        )
        for at, samples in sorted(seen.items())
        if len(samples) == len(lives)
    ]


def judge_outcomes(outcomes: Sequence[Outcome], aways: Sequence[Away]) -> tuple[Counter[str], list[str]]:
    """Count how requests ended, and tell which ends are not allowed.

    While a process is away, requests may fail. A connection may break without a word only when the gateway itself was
    killed: then it counts as failed too.
    """
    counts: Counter[str] = Counter()
    problems: list[str] = []
    for outcome in outcomes:
        covering = [away for away in aways if away.covers(outcome)]
        end = outcome.end
        if end == "lost" and any(away.victim == "gateway" for away in covering):
            end = "failed"
        counts[end] += 1
        if end in ("lost", "hung") or (end == "failed" and not covering):
            seconds = outcome.ended - outcome.begun
            problems.append(f"a request ({outcome.kind}) {end} after {seconds:.1f} s: {outcome.detail[:200]}")
    total = sum(counts[end] for end in ENDS)
    if total != len(outcomes):
        problems.append(f"{len(outcomes)} requests were sent and {total} have an end")
    return counts, problems


class Client:
    """Sends requests of one kind each and tells how they end.

    Args:
        hang: seconds without an end after which a request hangs.
    """

    def __init__(self, port: int, model: str, hang: float, seed: int) -> None:
        self._port = port
        self._model = model
        self._hang = hang
        self._random = random.Random(seed)
        self.outcomes: list[Outcome] = []
        self.running = 0
        self.kinds: tuple[tuple[str, int, Callable[[], Any]], ...] = (
            ("whole", 30, lambda: self._complete(stream=False)),
            ("stream", 30, lambda: self._complete(stream=True)),
            ("disconnect", 12, self._disconnect),
            ("cancel", 6, self._cancel),
            ("half a request", 4, self._half),
            ("slow reader", 3, self._slow),
            ("bad request", 15, self._bad),
        )

    async def one(self) -> None:
        """Send one request of a random kind."""
        names, weights, acts = zip(*self.kinds, strict=True)
        [number] = self._random.choices(range(len(names)), weights)
        begun = time.monotonic()
        self.running += 1
        try:
            end, detail = await asyncio.wait_for(acts[number](), self._hang)
        except asyncio.TimeoutError:
            end, detail = "hung", f"no end within {self._hang:g} s"
        except OSError as problem:
            end, detail = "lost", repr(problem)
        finally:
            self.running -= 1
        self.outcomes.append(Outcome(names[number], end, begun, time.monotonic(), detail))

    async def _complete(self, *, stream: bool) -> tuple[End, str]:
        reader, writer = await self._send(*self._request(stream=stream))
        try:
            return _judge(await _read_all(reader), streamed=stream)
        finally:
            writer.close()

    async def _disconnect(self) -> tuple[End, str]:
        """Leave while the answer streams."""
        reader, writer = await self._send(*self._request(stream=True, tokens=200))
        try:
            part = await reader.read(600)
            await asyncio.sleep(self._random.random() * 0.2)
            return ("left", "") if part else ("lost", "closed without a byte")
        finally:
            writer.transport.abort()

    async def _cancel(self) -> tuple[End, str]:
        """Leave before the first byte."""
        _, writer = await self._send(*self._request(stream=self._random.random() < 0.5, tokens=200))
        await asyncio.sleep(self._random.random() * 0.01)
        writer.close()
        return "left", ""

    async def _half(self) -> tuple[End, str]:
        """Leave in the middle of the body."""
        path, body = self._request(stream=False)
        _, writer = await self._send(path, body, sent=len(body) // 2)
        writer.close()
        return "left", ""

    async def _slow(self) -> tuple[End, str]:
        """Read a stream in small parts with pauses."""
        reader, writer = await self._send(*self._request(stream=True, tokens=60))
        try:
            answer = bytearray()
            while part := await reader.read(256):
                answer += part
                await asyncio.sleep(0.05)
            return _judge(bytes(answer), streamed=True)
        finally:
            writer.close()

    async def _bad(self) -> tuple[End, str]:
        """Send what must be refused, and check that it is refused with a reason."""
        messages = [{"role": "user", "content": "Hello"}]
        path, body, headers = self._random.choice(
            (
                ("/v1/chat/completions", b'{"messages": [', {}),
                ("/v1/chat/completions", json.dumps({"model": "another", "messages": messages}).encode(), {}),
                ("/v1/chat/completions", json.dumps({"model": self._model, "messages": []}).encode(), {}),
                ("/v1/completions", json.dumps({"model": self._model, "prompt": "x", "max_tokens": -1}).encode(), {}),
                ("/v1/completions", json.dumps({"model": self._model, "prompt": "1" * 200_000}).encode(), {}),
                ("/v1/completions", b"\xff\xfe", {}),
                ("/v1/chat/completions", b"{}", {"Content-Encoding": "gzip"}),
                ("/v1/embeddings", json.dumps({"model": self._model, "input": "x"}).encode(), {}),
            )
        )
        reader, writer = await self._send(path, body, headers=headers)
        try:
            end, detail = _judge(await _read_all(reader), streamed=False)
        finally:
            writer.close()
        return ("failed", f"{path}: was answered: {detail}") if end == "answered" else (end, detail)

    def _request(self, *, stream: bool, tokens: int = 0) -> tuple[str, bytes]:
        draw = self._random
        text = " ".join(draw.choice(("tell", "me", "a", "story", "about", "the", "sea")) for _ in range(8))
        tokens = tokens or draw.choice((1, 4, 16, 40))
        messages = [{"role": "user", "content": text}]
        common: dict[str, Any] = {"model": self._model, "max_tokens": tokens, "stream": stream}
        path = draw.choice(("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"))
        if path == "/v1/completions":
            common |= {"prompt": text, "n": draw.choice((1, 1, 2)), "ignore_eos": True}
        elif path == "/v1/responses":
            common = {"model": self._model, "max_output_tokens": max(16, tokens), "stream": stream, "input": text}
        else:
            common["messages"] = messages
        return path, json.dumps(common).encode()

    async def _send(
        self, path: str, body: bytes, *, headers: Mapping[str, str] | None = None, sent: int | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json", *(f"{name}: {value}" for name, value in (headers or {}).items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body[:sent])
        with suppress(ConnectionError):  # a refusal may come before all of the body is sent
            await writer.drain()
        return reader, writer


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    answer = bytearray()
    with suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            answer += part
    return bytes(answer)


def _judge(answer: bytes, *, streamed: bool) -> tuple[End, str]:
    """How a request ended, from all bytes of the connection."""
    head, found, body = answer.partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    if not found or len(words) < 2 or not words[1].isdigit():
        return "lost", f"no answer: {answer[:100]!r}"
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if fields.get(b"transfer-encoding") == b"chunked":
        if not body.endswith(b"0\r\n\r\n"):
            return "lost", f"cut: {body[-100:]!r}"
    elif len(body) < int(fields.get(b"content-length", b"0")):
        return "lost", f"cut: {body[-100:]!r}"
    status = int(words[1])
    if status >= 400:
        if b'"error"' not in body:
            return "lost", f"status {status} without a reason"
        return ("failed" if status in (500, 504) else "refused"), f"{status}: {body[:200]!r}"
    if not streamed:
        return "answered", body[:100].decode("utf-8", "replace")
    if any(mark in body for mark in (b"data: [DONE]", b"event: message_stop", b"event: response.completed")):
        return "answered", ""
    if b"event: response.incomplete" in body:  # it reached its limit
        return "answered", ""
    return ("failed" if b'"error"' in body else "lost"), body[-200:].decode("utf-8", "replace")


def look_at(pid: int, now: float) -> Sample | None:
    """Look at a process; None if it has ended and its parent does not know yet.

    Raises:
        OSError, KeyError: if it is gone.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if fields["State"].split()[0] == "Z":
        return None
    megabytes = int(fields["RssAnon"].split()[0]) / 1024
    return Sample(now, megabytes, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]))


class Watch:
    """Looks at every process of a server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.lives: dict[tuple[int, str | None], Life] = {}  # by process id and birth: ids come again

    def look(self) -> None:
        self._server.look()
        now = time.monotonic()
        server = self._server
        ours = {pid: command for pid, command in server.pids.items() if server.lives(pid)}
        for pid, command in {**ours, server.process.pid: "trtqwen serve"}.items():
            with suppress(OSError, KeyError, ValueError):
                born, sample = birth(pid), look_at(pid, now)
                if sample is not None:
                    role = next((role for text, role in ROLES.items() if text in command), "other")
                    self.lives.setdefault((pid, born), Life(role, pid)).samples.append(sample)

    def living(self, now: float, every: float) -> list[Life]:
        """The lives that the latest look saw."""
        return [life for life in self.lives.values() if life.samples and life.samples[-1].at >= now - 1.5 * every]


@dataclass
class Idle:
    """What a server holds without load."""

    in_flight: float
    queued: float
    used_blocks: float
    shared_memory: int
    temporary_files: int


def idle(server: Server) -> Idle:
    """Look at a server after its load; a Miss if it does not become idle within a minute."""
    deadline = time.monotonic() + 60
    while True:
        gateway = server.get("/metrics")[1]
        with suppress(OSError):
            with urllib.request.urlopen(f"http://{server.info['metrics']}", timeout=10) as answer:
                engine = answer.read().decode()
            found = Idle(
                _metric(gateway, "trtqwen_gateway_in_flight "),
                _metric(gateway, "trtqwen_gateway_queued "),
                _metric(engine, 'block_type="used"'),
                len(server.shared_memory()),
                sum(len(files) for _, _, files in os.walk(server.temporary / "tmp")),
            )
            if (found.in_flight, found.queued, found.used_blocks) == (0, 0, 0):
                return found
            if time.monotonic() > deadline:
                raise Miss(f"not idle a minute after the load: {found}")
        if time.monotonic() > deadline:
            raise Miss("the metrics cannot be read a minute after the load")
        time.sleep(0.5)


def _metric(text: str, name: str) -> float:
    lines = [line for line in text.splitlines() if name in line and not line.startswith("#")]
    return sum(float(line.split()[-1]) for line in lines)


async def soak(server: Server, options: argparse.Namespace, watch: Watch) -> tuple[list[Outcome], list[Away]]:
    """Load and disturb the server; returns how each request ended, and when a process was away."""
    client = Client(server.port, server.repository.name, options.hang, options.seed)
    begun = time.monotonic()
    end = begun + 60 * options.minutes
    tasks: set[asyncio.Task[None]] = set()
    aways: list[Away] = []
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def send() -> None:
        task = asyncio.create_task(client.one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def load() -> None:
        draw = random.Random(options.seed + 1)
        while True:
            await asyncio.sleep(draw.expovariate(options.rate))
            for _ in range(20 if draw.random() < options.bursts else 1):
                send()

    async def disturb() -> None:
        kills = options.kills
        for number in range(kills):
            at = begun + (number + 0.5) / kills * (end - begun) / 2
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            name, text, what = VICTIMS[number % len(VICTIMS)]
            aways.append(await _kill(server, name, text, what))

    async def observe() -> None:
        told = begun
        while True:
            watch.look()
            now = time.monotonic()
            if now - told >= options.progress:
                told = now
                print(_progress(client, watch, now - begun, options), file=sys.stderr, flush=True)
            await asyncio.sleep(options.every)

    actors = [asyncio.create_task(actor()) for actor in (load, disturb, observe)]
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([*actors, stopping], timeout=end - begun, return_when=asyncio.FIRST_EXCEPTION)
        while not done & {stopping} and time.monotonic() < end:
            for task in done:
                task.result()  # an actor that failed ends the run
            left = [task for task in [*actors, stopping] if not task.done()]
            done, _ = await asyncio.wait(
                left, timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
    finally:
        for task in [*actors, stopping]:
            task.cancel()
        await asyncio.gather(*actors, stopping, return_exceptions=True)
    if tasks:
        await asyncio.wait(tasks, timeout=options.hang + 10)
    return client.outcomes, aways


async def _kill(server: Server, name: str, text: str, what: signal.Signals) -> Away:
    begun = time.monotonic()
    process = server.pid(text)
    os.kill(process, what)
    deadline, red = begun + START_SECONDS, False
    while True:
        status, _ = await asyncio.to_thread(server.get, "/ready")
        red = red or status != 200
        # Until the supervisor has noticed, the service may look ready.
        gone = not server.lives(process)
        if status == 200 and (red or (gone and time.monotonic() - begun > 15)):
            return Away(name, begun, time.monotonic())
        if server.process.poll() is not None:
            raise Miss(f"serve ended after {name} was killed: {server.err.read_text()[-300:]}")
        if time.monotonic() > deadline:
            raise Miss(f"not ready {START_SECONDS} s after {name} was killed")
        await asyncio.sleep(0.1)


def _progress(client: Client, watch: Watch, seconds: float, options: argparse.Namespace) -> str:
    counts = Counter(outcome.end for outcome in client.outcomes)
    ends = ", ".join(f"{counts[end]} {end}" for end in ENDS if counts[end])
    lives = watch.living(time.monotonic(), options.every)
    memory: Counter[str] = Counter()
    for life in lives:
        memory[life.role] += round(life.samples[-1].megabytes)
    sizes = ", ".join(f"{role} {size}" for role, size in memory.most_common(4))
    return f"{seconds / 60:5.1f} min: {ends}; {client.running} open; MB: {sizes}"


def table(verdicts: Sequence[Verdict]) -> str:
    """The services that lived long enough to be judged, as Markdown."""
    lines = [
        "| service | processes | private MB, first and last third | MB/h, 95 % | descriptors | threads | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in verdicts:
        if one.slope is None:
            continue
        pair = [f"{before} -> {after}" for before, after in (one.descriptors, one.threads)]
        memory = f"{one.megabytes[0]:.1f} -> {one.megabytes[1]:.1f}"
        says = "; ".join(one.problems) or "steady"
        rate, low, high = one.slope
        rates = f"{rate:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {one.role} | {one.processes} | {memory} | {rates} | {' | '.join(pair)} | {says} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="for `trtqwen build`")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=1, help="requests in a second, on average")
    parser.add_argument("--bursts", type=float, default=0.01, help="share of arrivals that are twenty at a time")
    parser.add_argument("--kills", type=int, help="in the first half; by default one for each two minutes of it")
    parser.add_argument("--workers", type=int, default=1, help="processes of the gateway")
    parser.add_argument("--hang", type=float, default=90, help="seconds without an end that count as a hang")
    parser.add_argument("--leak", type=float, default=20, help="MB in an hour that a service may grow by")
    parser.add_argument("--every", type=float, help="seconds between two looks at the processes")
    parser.add_argument("--progress", type=float, default=60, help="seconds between two lines of progress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    options.kills = int(options.minutes / 4) if options.kills is None else options.kills
    options.every = options.every or min(10.0, max(1.0, options.minutes * 60 / 200))
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        home = Path(place)
        build(home, *(f"--set={setting}" for setting in options.set))
        settings = home / "gateway.yaml"
        settings.write_text(f"workers: {options.workers}\n")
        server = Server(home / "repo", ("--restart", f"--gateway-config={settings}")).start()
        try:
            return run(server, options)
        finally:
            server.clean()


def run(server: Server, options: argparse.Namespace) -> int:
    """Soak a running server and print the result; returns the exit code."""
    watch, problems = Watch(server), []
    outcomes: list[Outcome] = []
    aways: list[Away] = []
    begun = time.monotonic()
    before = idle(server)
    try:
        outcomes, aways = asyncio.run(soak(server, options, watch))
        after = idle(server)
        for name in ("shared_memory", "temporary_files"):
            if getattr(after, name) > getattr(before, name):
                problems.append(
                    f"{name.replace('_', ' ')}: {getattr(before, name)} before, {getattr(after, name)} after"
                )
    except Miss as problem:
        problems.append(str(problem))
    seconds = time.monotonic() - begun
    counts, wrong = judge_outcomes(outcomes, aways)
    problems += wrong
    settled = max([begun + seconds / 2, *(away.ended for away in aways)])
    services: dict[str, list[Life]] = {}
    for life in watch.lives.values():
        if life.samples:
            services.setdefault(life.role, []).append(life)
    verdicts = [judge_service(services[role], settled, options.leak) for role in sorted(services)]
    problems += [f"{one.role}: {what}" for one in verdicts for what in one.problems]
    server.look()
    server.process.terminate()
    try:
        server.ended(120)
        if left := server.remains():
            problems.append(f"left after the server's end: {left}")
    except Miss as problem:
        problems.append(str(problem))
    print(f"{len(outcomes)} sent = " + " + ".join(f"{counts[end]} {end}" for end in ENDS[:4]))
    print(f"{counts['lost']} lost, {counts['hung']} hung, in {seconds / 60:.1f} minutes")
    victims = ", ".join(f"{away.victim} ({away.ended - away.begun:.0f} s away)" for away in aways)
    print(f"killed: {victims or 'nothing'}\n\n{table(verdicts)}\n")
    for what in problems[:40]:
        print(f"FAILED: {what}")
    if options.json:
        content = {
            "minutes": round(seconds / 60, 1),
            "sent": len(outcomes),
            "ends": {end: counts[end] for end in ENDS},
            "kinds": Counter(outcome.kind for outcome in outcomes),
            "away": [{"victim": away.victim, "seconds": round(away.ended - away.begun, 1)} for away in aways],
            "processes": [vars(one) for one in verdicts],
            "problems": problems,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    print("failed" if problems else "held")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the gateway costs, and how it stands overload: python scripts/bench_gateway.py [--overload] [--help]

Both run against a real Triton whose engine is a stand-in (see stand_in_engine.py) that sends a token to each of its
streams every `--step-ms`, as a GPU engine does: on a machine with few cores a real engine would hide the gateway's
cost behind its own. Client, gateway and Triton share this machine. The stand-in notes when it sends each token; a
token's delay is from there to its arrival at the client, through the gateway or by gRPC straight from Triton.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from stand_in_engine import write_stand_in_repository

from trtqwen.artifact.names import tokenizer_directory
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.generation.upstream import Replica
from trtqwen.gateway.process import GatewayProcess
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.triton.ports import Ports
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

_TICKS = os.sysconf("SC_CLK_TCK")
_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
_CONTENT = b'"delta":{"content":"'  # each token is one character
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Answer:
    """How one request went; `times` are its tokens' arrivals in seconds of the monotonic clock."""

    status: int = 0
    id: str = ""
    times: list[float] = field(default_factory=list)
    finished: bool = False
    error: str = ""


async def ask_gateway(port: int, body: dict[str, Any]) -> Answer:
    """A streamed chat by hand: a full client would cost more than what is measured."""
    answer = Answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps({"model": "bench", "stream": True, **body}).encode()
        writer.write(_HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        answer.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b'data: {"error"'):
                answer.error = line.decode().strip()
            elif (start := line.find(_CONTENT)) >= 0:
                text = line[start + len(_CONTENT) : line.index(b'"', start + len(_CONTENT))]
                answer.times += [time.monotonic()] * len(text)
                answer.id = answer.id or json.loads(line[6:])["id"]
            elif line.startswith(b"data: [DONE]"):
                answer.finished = True
                break
            elif answer.status != 200 and line == b"\r\n":
                break
    except OSError as problem:
        answer.error = str(problem)
    finally:
        writer.close()
    return answer


async def ask_triton(replica: Replica, prompt: Sequence[int], max_tokens: int) -> Answer:
    """The same straight from Triton."""
    inputs = {
        "input_ids": np.array([prompt], np.int32),
        "input_lengths": np.array([[len(prompt)]], np.int32),
        "request_output_len": np.array([[max_tokens]], np.int32),
        "streaming": np.array([[True]]),
    }
    answer = Answer(status=200, id=f"direct-{uuid.uuid4().hex}")
    async for reply in replica.generate(f"{answer.id}-0", inputs, 600):
        answer.times += [time.monotonic()] * len(reply.token_ids)
    answer.finished = True
    return answer


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1e6


def clients_of_gateway(port: int, message: str, streams: int, tokens: int) -> list[Answer]:
    """Streams that one process reads through the gateway."""
    body = {"messages": [{"role": "user", "content": message}], "max_tokens": tokens}

    async def ask() -> list[Answer]:
        return await asyncio.gather(*(ask_gateway(port, body) for _ in range(streams)))

    return uvloop.run(ask())


def clients_of_triton(address: str, prompt: Sequence[int], streams: int, tokens: int) -> list[Answer]:
    """Streams that one process reads straight from Triton."""

    async def ask() -> list[Answer]:
        replica = Replica(address)
        try:
            return await asyncio.gather(*(ask_triton(replica, prompt, tokens) for _ in range(streams)))
        finally:
            await replica.close()

    return uvloop.run(ask())


class Bench:
    """Tritons with the stand-in, a gateway in front of them, and a process of clients for each of them."""

    def __init__(self, options: argparse.Namespace, home: Path) -> None:
        self.options = options
        self.times = home / "times"
        self.times.mkdir()
        limits = {"max_batch_size": options.streams, "max_num_tokens": 4096, "max_seq_len": 2048}
        run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="float32")), home / "checkpoint")
        build_engine(home / "checkpoint", EngineRecipe(backend="torch", **limits), home / "engine")
        write_repository(home / "engine", ServeRecipe(), home / "plain")
        write_stand_in_repository(
            home / "plain", home / "stand-in", step_ms=options.step_ms, send_times=str(self.times)
        )
        self.tokenizer = Tokenizer(tokenizer_directory(home / "stand-in"))
        self.servers = [
            TritonServer(home / "stand-in", ports=Ports(0, 0, 0), drain_seconds=2) for _ in range(options.replicas)
        ]
        addresses = tuple(server.grpc_url for server in self.servers)
        config = GatewayConfig(repository=home / "stand-in", triton=addresses, port=0, model_name="bench")
        self.gateway = GatewayProcess(config)
        self.pool = ProcessPoolExecutor(options.replicas, multiprocessing.get_context("spawn"))

    def message(self, tokens: int) -> str:
        return f"/again {tokens} a"

    def delays(self, answers: Sequence[Answer]) -> list[float]:
        """Seconds from the engine to the client, of every token."""
        delays = []
        for answer in answers:
            sent = json.loads((self.times / f"{answer.id}-0").read_text())
            assert len(sent) == len(answer.times), (len(sent), len(answer.times))
            delays += [arrived - left for arrived, left in zip(answer.times, sent, strict=True)]
        return delays

    def through_gateway(self, streams: int, tokens: int) -> list[Answer]:
        port, message = self.gateway.config.port, self.message(tokens)
        asked = [self.pool.submit(clients_of_gateway, port, message, streams, tokens) for _ in self.servers]
        return [answer for clients in asked for answer in clients.result()]

    def direct(self, streams: int, tokens: int) -> list[Answer]:
        prompt = self.tokenizer.encode(f"<|im_start|>user\n{self.message(tokens)}<|im_end|>\n")
        addresses = [server.grpc_url for server in self.servers]
        asked = [self.pool.submit(clients_of_triton, address, prompt, streams, tokens) for address in addresses]
        return [answer for clients in asked for answer in clients.result()]

    def latency(self) -> dict[str, Any]:
        """Delay per token and throughput of both paths, measured alternately."""
        options = self.options
        self.through_gateway(4, 20)
        rounds: dict[str, list[tuple[float, float, float]]] = {"direct": [], "gateway": []}
        cpu = busiest = 0.0
        for _ in range(options.rounds):
            for name, ask in (("direct", self.direct), ("gateway", self.through_gateway)):
                before, begun = cpu_seconds(self.gateway.pid), time.monotonic()
                answers = ask(options.streams, options.tokens)
                seconds = time.monotonic() - begun
                if name == "gateway":
                    used = cpu_seconds(self.gateway.pid) - before
                    cpu, busiest = cpu + used, max(busiest, used / seconds)
                assert all(answer.finished for answer in answers), [answer.error for answer in answers]
                delays = self.delays(answers)
                p99 = sorted(delays)[int(len(delays) * 0.99)]
                rounds[name].append((statistics.median(delays), p99, len(delays) / seconds))
        result: dict[str, Any] = {
            name: getattr(options, name) for name in ("replicas", "streams", "tokens", "step_ms")
        }
        for name, rows in rounds.items():
            median, p99, rate = (statistics.median(column) for column in zip(*rows, strict=True))
            result[name] = {"median_ms": median * 1e3, "p99_ms": p99 * 1e3, "tokens_per_second": rate}
        direct, gateway = result["direct"], result["gateway"]
        total = options.rounds * options.replicas * options.streams * options.tokens
        return result | {
            "added_median_ms": gateway["median_ms"] - direct["median_ms"],
            "lost_throughput_percent": 100 * (1 - gateway["tokens_per_second"] / direct["tokens_per_second"]),
            "gateway_cpu_us_per_token": cpu / total * 1e6,
            "gateway_cores": busiest,
        }

    async def overload(self) -> dict[str, Any]:
        """Requests at four times the rate that the engine finishes them."""
        options, tokens = self.options, 32
        body = {"messages": [{"role": "user", "content": self.message(tokens)}], "max_tokens": tokens}
        port = self.gateway.config.port

        async def closed_loop(until: float) -> int:
            count = 0
            while time.monotonic() < until:
                count += len((await ask_gateway(port, body)).times)
            return count

        calm = 10.0
        until = time.monotonic() + calm
        most = sum(await asyncio.gather(*(closed_loop(until) for _ in range(options.streams)))) / calm
        rate = 4 * most / tokens
        memory = [rss_mb(self.gateway.pid)]
        begun = time.monotonic()
        tasks = []
        for number in range(int(rate * options.seconds)):
            due = begun + number / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask_gateway(port, body)))
            if number % max(1, int(rate * options.seconds / 6)) == 0:
                memory.append(rss_mb(self.gateway.pid))
        lasted = time.monotonic() - begun
        done, hanging = await asyncio.wait(tasks, timeout=90)
        memory.append(rss_mb(self.gateway.pid))
        answers = [task.result() for task in done]
        during = sum(sum(arrived < begun + lasted for arrived in answer.times) for answer in answers)
        return {
            "most_tokens_per_second": most,
            "requests_per_second": rate,
            "tokens_per_second": during / lasted,
            "share_of_most_percent": 100 * during / lasted / most,
            "statuses": dict(Counter(str(answer.status) for answer in answers)),
            "lost": sum(answer.status == 200 and not answer.finished for answer in answers),
            "hanging": len(hanging),
            "errors": dict(Counter(answer.error for answer in answers if answer.error)),
            "gateway_rss_mb": [round(value, 1) for value in memory],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overload", action="store_true", help="four times what the engine can do")
    parser.add_argument("--replicas", type=int, default=1, help="Tritons, each with this many streams")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=25, help="of the stand-in engine; 0 is as fast as it can")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(options, Path(home))
        with ExitStack() as running:
            running.enter_context(bench.pool)
            for service in (*bench.servers, bench.gateway):
                running.enter_context(service)
            result = uvloop.run(bench.overload()) if options.overload else bench.latency()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

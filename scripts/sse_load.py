"""A closed loop of streaming requests to an OpenAI completions server: python scripts/sse_load.py --help

Prints one JSON object: output tokens/s, and median and 95th percentile of the time to the first piece and between
pieces. Tokens are those that the server counts in `usage`. A `client_cpu_s` close to `seconds` says that this client
was the bottleneck. Ends with 1 if a request was not answered. Only the standard library, and little work for each
piece: the client shares the machine with the server that it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Figures:
    """What came back; times in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)

    def summary(self, seconds: float) -> dict[str, object]:
        return {
            "output_tokens_per_s": round(self.tokens / seconds, 1),
            "ttft_ms": [_percentile(self.first, 50), _percentile(self.first, 95)],
            "gap_ms": [_percentile(self.gaps, 50), _percentile(self.gaps, 95)],
            "tokens": self.tokens,
            "pieces": len(self.first) + len(self.gaps),
            "seconds": round(seconds, 2),
            "client_cpu_s": round(time.process_time(), 2),
            "errors": self.errors[:3],
        }


def _percentile(values: list[float], percent: int) -> float | None:
    if not values:
        return None
    return round(1000 * sorted(values)[min(len(values) - 1, len(values) * percent // 100)], 1)


async def one(url: str, body: bytes, figures: Figures) -> None:
    """Send a request and read its stream to the end."""
    place = urlsplit(url)
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    status = (await reader.readline()).split()[1]
    last = None
    try:
        async for line in reader:
            if status != b"200":
                figures.errors += [line.decode()] if line.startswith(b"{") else []
            elif line.startswith(b"data: {"):
                now = time.perf_counter()
                if b'"usage":{' in line or b'"usage": {' in line:
                    figures.tokens += json.loads(line[6:])["usage"]["completion_tokens"]
                elif last is None:
                    figures.first.append(now - begun)
                    last = now
                else:
                    figures.gaps.append(now - last)
                    last = now
    finally:
        writer.close()


async def load(
    url: str,
    model: str,
    *,
    concurrency: int,
    requests: int,
    inputs: int,
    outputs: int,
    seed: int | None = None,
    vocabulary: int = 4000,
) -> dict[str, object]:
    """Keep `concurrency` requests open until `requests` are answered; prompts are random token ids."""
    rng = random.Random(seed)
    figures = Figures()
    bodies = []
    for _ in range(requests):
        content = {
            "model": model,
            "prompt": [rng.randrange(300, vocabulary) for _ in range(inputs)],
            "max_tokens": outputs,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        bodies.append(json.dumps(content).encode())

    async def work() -> None:
        while bodies:
            await one(url, bodies.pop(), figures)

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return figures.summary(time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--inputs", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--outputs", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--seed", type=int, help="of the prompts; by default no run repeats those of another")
    options = vars(parser.parse_args())
    figures = asyncio.run(load(options.pop("url"), options.pop("model"), **options))
    print(json.dumps(figures))
    sys.exit(bool(figures["errors"]))


if __name__ == "__main__":
    main()

"""Measure what the way to the client costs: the same load on an engine in process, over gRPC, and over HTTP.

    python scripts/bench_path.py --repository REPOSITORY
    python scripts/bench_path.py --random qwen2.5-7b --work /dev/shm/path

The embedded engine answers a closed loop of requests three times: from the process that measures, through Triton's
gRPC, and through the gateway's OpenAI route. Prints output tokens/s, the median time to first token and the median
time between tokens of each, and the share of the rate in process. Prompts are random tokens, and answers have the
length asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from peers import free_port, trtqwen_server
from random_engine import make_repository

from trtqwen.artifact.names import TOKENIZER_DIRECTORY
from trtqwen.bench.contender import Contender, contender_engine
from trtqwen.bench.figures import Figures, figures
from trtqwen.bench.load import Job, open_clients, send_all
from trtqwen.bench.records import RequestRecord
from trtqwen.bench.run import probe, run_phase
from trtqwen.bench.workload import Shape, Workload, plain_vocabulary, synthetic
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import EngineRecipe, ServeRecipe
from trtqwen.triton.engines import open_engine
from trtqwen.tune.bench import EngineEndpoint, executor_config

NAME = "measured"


def in_process(engine_directory: Path, loads: dict[int, Workload]) -> dict[int, Figures]:
    """The figures of each load, by concurrency, without a server."""
    engine = open_engine(engine_directory, executor_config(ServeRecipe()), verify=False)

    def send(load: Workload, concurrency: int) -> list[RequestRecord]:
        job = Job(tuple(enumerate(load.asks)), concurrency, time.monotonic())
        return asyncio.run(send_all(EngineEndpoint(engine), job))

    found = {}
    try:
        for concurrency, load in loads.items():
            send(load, concurrency)  # compiles and fills caches
            found[concurrency] = figures([send(load, concurrency)], ())
    finally:
        engine.shutdown()
    return found


def through(url: str, model: str | None, loads: dict[int, Workload], processes: int) -> dict[int, Figures]:
    """The figures of each load, by concurrency, from a server."""
    target, _ = probe(url, model)
    found = {}
    for concurrency, load in loads.items():
        with open_clients(target, min(processes, concurrency)) as clients:
            run_phase(clients, load, concurrency, lambda done, tokens: None)
            result = run_phase(clients, load, concurrency, lambda done, tokens: None)
        found[concurrency] = figures([result.records], result.clients)
    return found


def row(way: str, concurrency: int, found: Figures, base: Figures) -> dict[str, object]:
    """One line of the result."""

    def rate(of: Figures) -> float:
        return of.rates["output_token_throughput"].avg

    latencies = {
        name: round(found.distributions[name].percentiles[50], 2)
        for name in ("time_to_first_token", "inter_token_latency")
    }
    return {
        "way": way,
        "concurrency": concurrency,
        "output tok/s": round(rate(found), 1),
        "of in process": round(rate(found) / rate(base), 3),
        **latencies,
    }


def main() -> None:
    """Parse the command line, measure, and print one JSON object for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, help="model repository of an embedded engine")
    parser.add_argument("--random", metavar="MODEL", help="make one with random weights in the shape of this model")
    parser.add_argument("--work", type=Path, required=True, help="directory for the logs and the random engine")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--outputs", type=int, default=256)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="that send")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.random:
        limits = EngineRecipe(backend="torch", max_batch_size=256, max_num_tokens=8192, max_seq_len=4096)
        options.repository, _ = make_repository(options.work / "random", options.random, "fp16", 1, limits)
    elif options.repository is None:
        parser.error("give --repository or --random")
    engine = contender_engine(Contender(NAME, repository=options.repository))
    assert engine is not None
    vocabulary = plain_vocabulary(Tokenizer(engine / TOKENIZER_DIRECTORY))
    shape = Shape(input=(options.inputs, 0), output=(options.outputs, 0))
    loads = {}
    for concurrency in options.concurrency:
        count = max(8, concurrency * options.requests_per_stream)
        loads[concurrency] = synthetic(NAME, shape, count, vocabulary, concurrency)
    ways = {"in process": in_process(engine, loads)}
    port = free_port()
    with trtqwen_server(options.repository, NAME, options.work / "serve.log", grpc_port=port) as server:
        ways["gRPC"] = through(f"127.0.0.1:{port}", None, loads, options.processes)
        ways["HTTP"] = through(server.url, None, loads, options.processes)
    for concurrency in loads:
        for way, found in ways.items():
            print(json.dumps(row(way, concurrency, found[concurrency], ways["in process"][concurrency])), flush=True)


if __name__ == "__main__":
    main()

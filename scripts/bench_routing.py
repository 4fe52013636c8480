"""Compare prefix routing with the rule of the fewest tokens: reuse of KV cache blocks and time to first token.

Four real Triton servers with the bundled model stand behind one gateway. Each has a KV cache that holds a quarter of
the workload's shared beginnings. The workload runs once with each rule, on fresh servers, in one run:

    python scripts/bench_routing.py --output routing.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, Final

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.process import GatewayProcess
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.triton.ports import Ports
from trtqwen.triton.repository import write_repository
from trtqwen.triton.server import TritonServer

REPLICAS = 4
BLOCK: Final = 16


def main() -> None:
    """Run both rules and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beginnings", type=int, default=32, help="shared beginnings, such as system prompts")
    parser.add_argument("--beginning-tokens", type=int, default=384)
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        repository = build(Path(directory), options)
        results = {rule: measure(repository, rule == "prefix", options) for rule in ("fewest tokens", "prefix")}
    for rule, result in results.items():
        print(rule, json.dumps(result))
    if options.output:
        options.output.write_text(
            json.dumps({"options": vars(options) | {"output": None}, **results}, indent=2) + "\n"
        )


def build(home: Path, options: argparse.Namespace) -> Path:
    """The bundled model with KV cache reuse, and a cache for a quarter of the beginnings and the running requests."""
    plan = plan_conversion(MODEL, CheckpointRecipe(dtype="float32"))
    run_conversion(plan, home / "checkpoint")
    engine = EngineRecipe(
        backend="torch", max_batch_size=16, max_num_tokens=512, max_seq_len=512, tokens_per_block=BLOCK
    )
    build_engine(home / "checkpoint", engine, home / "engine")
    tokens = options.beginnings // REPLICAS * options.beginning_tokens + options.concurrency * 512
    serve = ServeRecipe(enable_kv_cache_reuse=True, max_tokens_in_paged_kv_cache=tokens // BLOCK * BLOCK)
    write_repository(home / "engine", serve, home / "repository")
    return home / "repository"


def measure(repository: Path, by_prefix: bool, options: argparse.Namespace) -> dict[str, Any]:
    """The workload on fresh servers."""
    with ExitStack() as started:
        servers = [started.enter_context(TritonServer(repository, ports=Ports(0, 0, 0))) for _ in range(REPLICAS)]
        config = GatewayConfig(
            repository=repository,
            triton=tuple(server.grpc_url for server in servers),
            port=0,
            model_name="qwen",
            prefix_routing=by_prefix,
        )
        gateway = started.enter_context(GatewayProcess(config))
        wait_for_replicas(gateway.url)
        before = metrics(gateway.url)
        prompts = workload(options)
        begun = time.monotonic()
        with ThreadPoolExecutor(options.concurrency) as pool:
            first = list(pool.map(lambda prompt: ask(gateway.config.port, prompt, options.answer_tokens), prompts))
        seconds = time.monotonic() - begun
        after = metrics(gateway.url)

    def grown(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.partition("{")[0] == name)

    sequences = {
        key: value - before.get(key, 0.0)
        for key, value in after.items()
        if key.startswith("trtqwen_gateway_replica_sequences_total")
    }
    return {
        "reuse_rate": grown("trtqwen_gateway_cached_prompt_tokens_total")
        / grown("trtqwen_gateway_prompt_tokens_total"),
        "first_token_mean_ms": 1000 * mean(first),
        "first_token_p95_ms": 1000 * quantiles(first, n=20)[-1],
        "requests_per_second": len(prompts) / seconds,
        "busiest_replica_share": max(sequences.values()) / sum(sequences.values()),
    }


def workload(options: argparse.Namespace) -> list[list[int]]:
    """Prompts as token ids: a shared beginning, of which some are asked for more often, and a question of its own."""
    chance = random.Random(0)
    beginnings = [chance.choices(range(1000, 4000), k=options.beginning_tokens) for _ in range(options.beginnings)]
    weights = [1 / (number + 1) ** 0.5 for number in range(options.beginnings)]
    chosen = chance.choices(beginnings, weights, k=options.requests)
    return [beginning + chance.choices(range(1000, 4000), k=options.question_tokens) for beginning in chosen]


def ask(port: int, prompt: list[int], answer_tokens: int) -> float:
    """Seconds to the first token."""
    body = {"model": "qwen", "prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    begun = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(answer.read().decode())
    answer.readline()
    seconds = time.monotonic() - begun
    answer.read()
    connection.close()
    return seconds


def metrics(url: str) -> dict[str, float]:
    """The gateway's samples by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def wait_for_replicas(url: str) -> None:
    """Return when all replicas are up."""
    name = "trtqwen_gateway_replica_up{"
    while sum(value for key, value in metrics(url).items() if key.startswith(name)) < REPLICAS:
        time.sleep(0.5)


if __name__ == "__main__":
    main()

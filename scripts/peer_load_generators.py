"""Compare the load generator with vLLM's and AIPerf on one server whose token times are known.

    python scripts/peer_load_generators.py --vllm-python .venv-vllm/bin/python [--aiperf AIPERF] [--repeats 3]

The server sends the first token after one second, each further one after 200 ms: what a busy machine adds is small
next to that. All generators keep four requests open, each of 64 prompt tokens and 8 answer tokens. They take turns.
Prints what the server's script says, the medians side by side, and their ratios to trtqwen's.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

MODEL = Path(__file__).parent.parent / "trtqwen" / "demo" / "model"
SCRIPT = {"first": 1.0, "gap": 0.2}
REQUESTS, OPEN, INPUTS, OUTPUTS = 16, 4, 64, 8
_SECONDS = SCRIPT["first"] + SCRIPT["gap"] * (OUTPUTS - 1)  # of each request
TRUTH = {
    "output_token_throughput": OPEN * OUTPUTS / _SECONDS,
    "request_throughput": OPEN / _SECONDS,
    "time_to_first_token": 1000 * SCRIPT["first"],
    "inter_token_latency": 1000 * SCRIPT["gap"],
}
_VLLM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
if __name__ == "__main__":
    main(parser.parse_args())
"""
_VLLM_NAMES = {
    "output_token_throughput": r"Output token throughput \(tok/s\):\s+([\d.]+)",
    "request_throughput": r"Request throughput \(req/s\):\s+([\d.]+)",
    "time_to_first_token": r"Mean TTFT \(ms\):\s+([\d.]+)",
    "inter_token_latency": r"Mean TPOT \(ms\):\s+([\d.]+)",
}


def ours(url: str) -> dict[str, float]:
    """Figures of `trtqwen bench`."""
    words = ["bench", url, "--workload", "chat", f"--tokenizer={MODEL}", f"--requests={REQUESTS}", "--json"]
    words += [f"--concurrency={OPEN}", f"--input-tokens={INPUTS}", f"--output-tokens={OUTPUTS}"]
    done = subprocess.run([sys.executable, "-m", "trtqwen", *words], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    return {name: report[name]["avg"] for name in _VLLM_NAMES}


def vllms(python: str, url: str) -> dict[str, float]:
    """Figures of vLLM's `bench serve`."""
    with tempfile.TemporaryDirectory() as home:
        program = Path(home) / "bench.py"
        program.write_text(_VLLM)
        words = ["--backend=openai", f"--base-url={url}", "--endpoint=/v1/completions", "--model=scripted"]
        words += [f"--tokenizer={MODEL}", "--dataset-name=random", f"--random-input-len={INPUTS}", "--ignore-eos"]
        words += [f"--random-output-len={OUTPUTS}", f"--num-prompts={REQUESTS}", f"--max-concurrency={OPEN}"]
        words.append("--num-warmups=4")
        done = subprocess.run([python, str(program), *words], check=True, capture_output=True, text=True)
    return {name: float(re.search(pattern, done.stdout)[1]) for name, pattern in _VLLM_NAMES.items()}  # type: ignore[index]


def aiperfs(program: str, url: str) -> dict[str, float]:
    """Figures of NVIDIA's AIPerf."""
    with tempfile.TemporaryDirectory() as home:
        words = ["profile", "--model=scripted", f"--url={url}", "--endpoint-type=completions", "--streaming"]
        words += [f"--tokenizer={MODEL}", f"--concurrency={OPEN}", f"--request-count={REQUESTS}"]
        words += ["--warmup-request-count=4", f"--synthetic-input-tokens-mean={INPUTS}", "--ui=none"]
        words += [f"--output-tokens-mean={OUTPUTS}", f"--extra-inputs=max_tokens:{OUTPUTS}", f"--artifact-dir={home}"]
        words += ["--extra-inputs=ignore_eos:true", "--use-server-token-count"]
        subprocess.run([program, *words], check=True, capture_output=True, text=True)
        file = next(Path(home).rglob("profile_export_aiperf.json"))  # some releases write it twice
        report = json.loads(file.read_text())
    return {name: float(report[name]["avg"]) for name in _VLLM_NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python")
    parser.add_argument("--aiperf")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    command = [sys.executable, "-m", "tests.bench.scripted", json.dumps(SCRIPT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            sides: dict[str, Callable[[], dict[str, float]]] = {"trtqwen": lambda: ours(url)}
            if given.vllm_python:
                sides["vllm"] = lambda: vllms(given.vllm_python, url)
            if given.aiperf:
                sides["aiperf"] = lambda: aiperfs(given.aiperf, url)
            turns = [{who: measure() for who, measure in sides.items()} for _ in range(given.repeats)]
        finally:
            server.kill()
    for name in _VLLM_NAMES:
        medians = {who: statistics.median(turn[who][name] for turn in turns) for who in sides}
        line = f"{name:<24} script {TRUTH[name]:8.2f}  "
        line += "".join(f"{who} {value:8.2f}  " for who, value in medians.items())
        ratios = [f"{who}/trtqwen {value / medians['trtqwen']:.3f}" for who, value in medians.items()]
        print(line + "  ".join(ratios[1:]))


if __name__ == "__main__":
    main()

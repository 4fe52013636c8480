"""A stand-in for tritonserver with the C++ backend: takes the real one's flags, answers when it is ready.

Writes what it was started with to STANDIN_RECORD, one JSON line a process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import FrameType

# From `tritonserver --help` of 2.51; a test compares them with the real program.
FLAGS = (
    "model-repository",
    "model-control-mode",
    "load-model",
    "disable-auto-complete-config",
    "backend-directory",
    "backend-config",
    "exit-timeout-secs",
    "http-address",
    "http-port",
    "grpc-address",
    "grpc-port",
    "metrics-address",
    "metrics-port",
    "allow-http",
    "allow-grpc",
    "allow-metrics",
    "http-restricted-api",
    "grpc-restricted-protocol",
    "pinned-memory-pool-byte-size",
    "enable-peer-access",
    "cuda-memory-pool-byte-size",
)


class Metrics(BaseHTTPRequestHandler):
    """What the file named by STANDIN_METRICS says now."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(Path(os.environ["STANDIN_METRICS"]).read_bytes())

    def log_message(self, format: str, *args: object) -> None:
        return


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


def stop(number: int, frame: FrameType | None) -> None:
    if "STANDIN_STUCK" in os.environ:  # a model that does not unload
        os.write(1, b"I0101 1 server.cc:1] Timeout 30: Found 1 live models and 0 in-flight non-inference requests\n")
    else:
        sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in FLAGS:
        if flag == "disable-auto-complete-config":
            parser.add_argument(f"--{flag}", action="store_true")
        else:
            parser.add_argument(f"--{flag}", action="append")
    options = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, stop)
    names = ("OMPI_COMM_WORLD_RANK", "SLURM_JOB_ID", "NCCL_P2P_DISABLE", "TRTLLM_ORCHESTRATOR")
    record = {
        "pid": os.getpid(),
        "options": {name: value for name, value in options.items() if value},
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }
    with Path(os.environ["STANDIN_RECORD"]).open("a") as file:
        file.write(json.dumps(record) + "\n")
    if os.environ.get("STANDIN_BROKEN_GPU", "") == record["gpus"]:
        sys.exit(1)
    if "STANDIN_CRASHES" in os.environ and len(Path(os.environ["STANDIN_RECORD"]).read_text().splitlines()) <= int(
        os.environ["STANDIN_CRASHES"]
    ):
        print("terminate called after throwing an instance of 'boost::interprocess::lock_exception'", flush=True)
        os.abort()
    print("E0101 00:00:00.000000 1 standin.cc:1] the last words of a rank", flush=True)
    if "STANDIN_METRICS" in os.environ and options["metrics_port"]:
        metrics = HTTPServer((options["metrics_address"][0], int(options["metrics_port"][0])), Metrics)
        threading.Thread(target=metrics.serve_forever, daemon=True).start()
    if options["allow_http"] == ["false"]:
        while True:
            time.sleep(60)
    HTTPServer((options["http_address"][0], int(options["http_port"][0])), Ready).serve_forever()


if __name__ == "__main__":
    main()

"""A stand-in for the exporters of a GPU machine, on a machine without GPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# As Triton 24.12 and DCGM exporter 4.1 write them; one card by each.
METRICS = """\
# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-11111111-0000-0000-0000-000000000000"} 0.61
nv_gpu_memory_total_bytes{gpu_uuid="GPU-11111111-0000-0000-0000-000000000000"} 25757220864
nv_gpu_memory_used_bytes{gpu_uuid="GPU-11111111-0000-0000-0000-000000000000"} 22548578304
nv_gpu_power_usage{gpu_uuid="GPU-11111111-0000-0000-0000-000000000000"} 251.2
# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-22222222-0000-0000-0000-000000000000",device="nvidia0",Hostname="h"} 47
DCGM_FI_DEV_FB_FREE{gpu="0",UUID="GPU-22222222-0000-0000-0000-000000000000",device="nvidia0",Hostname="h"} 2104
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-22222222-0000-0000-0000-000000000000",device="nvidia0",Hostname="h"} 22012
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-22222222-0000-0000-0000-000000000000",device="nvidia0",Hostname="h"} 240.5
"""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def gpu_exporter() -> Iterator[str]:
    """Its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()

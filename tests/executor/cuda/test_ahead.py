"""Kernels are compiled for an H100 here: that needs no card. Only their launches do."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class NoCard:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(NoCard())
    torch.cuda.set_device = lambda device: None

    from trtqwen.executor.cuda.kernels import activation, embed
    from trtqwen.executor.cuda.kernels.ahead import compile_ahead

    results = []

    def run():
        for dtype in (torch.float16, torch.float16, torch.bfloat16):
            results.append(activation.silu_mul(torch.zeros(4, 256, dtype=dtype), None))
        table, slots = torch.zeros(8, 64, dtype=torch.float16), torch.zeros(4, dtype=torch.int64)
        results.append(embed.embed(torch.zeros(2, dtype=torch.int32), slots, table, 0))

    print(compile_ahead(run, torch.device("cpu")), len(results))
    for kernel in (activation._silu_mul, activation._silu_mul_row, embed._embed):
        for compiled in kernel.device_caches[0][0].values():
            print(compiled.name, ".target sm_90" in compiled.asm["ptx"], len(compiled.asm["cubin"]) > 1000)
"""


def test_kernels_are_compiled_before_anything_launches_them(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    first, *kernels = ran.stdout.splitlines()
    assert first == "3 4"  # the same kernel twice is compiled once
    assert sorted(kernels) == ["_embed True True"] + 2 * ["_silu_mul True True"]

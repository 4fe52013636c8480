"""Kernels are compiled for an H100 here: that needs no card. Their launches do, and are played."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.executor.cuda.test_model import PRECISIONS
from tests.slow import slow
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.hf.source import HfModel
from trtqwen.quantize.calibrate import calibrate
from trtqwen.quantize.ranges import write_ranges
from trtqwen.recipe import CheckpointRecipe

NO_CARD = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace

    import numpy as np
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class NoCard:
        utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20, "multiprocessor_count": 132},
        )

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def launcher_cls(self, source, metadata):
            return lambda *arguments: None

    driver.set_active(NoCard())
    torch.cuda.set_device = lambda device: None
    cpu = torch.device("cpu")
"""
TWO_KERNELS = """
    from trtqwen.executor.cuda.kernels import activation, embed
    from trtqwen.executor.cuda.kernels.ahead import compile_ahead

    results = []

    def run():
        for dtype in (torch.float16, torch.float16, torch.bfloat16):
            results.append(activation.silu_mul(torch.zeros(4, 256, dtype=dtype), None))
        table, slots = torch.zeros(8, 64, dtype=torch.float16), torch.zeros(4, dtype=torch.int64)
        results.append(embed.embed(torch.zeros(2, dtype=torch.int32), slots, table, 0))

    print(compile_ahead(run, cpu), len(results))
    for kernel in (activation._silu_mul, activation._silu_mul_row, embed._embed):
        for compiled in kernel.device_caches[0][0].values():
            print(compiled.name, ".target sm_90" in compiled.asm["ptx"], len(compiled.asm["cubin"]) > 1000)
"""
WHOLE_START = """
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)

    from trtqwen.checkpoint.config import read_checkpoint_config
    from trtqwen.checkpoint.reader import read_rank
    from trtqwen.executor.cuda import warm_up
    from trtqwen.executor.cuda.batch import CudaBatch, context_tiles, with_tiles
    from trtqwen.executor.cuda.kernels.choose import choose_fused
    from trtqwen.executor.cuda.kernels.penalize import penalize_fused
    from trtqwen.executor.cuda.model import CudaModel
    from trtqwen.executor.parallel import SingleRank
    from trtqwen.executor.sampling import Sampler

    checkpoint, layout = Path(sys.argv[1]), sys.argv[2]
    config = read_checkpoint_config(checkpoint)
    model = CudaModel(
        config, dict(read_rank(checkpoint, 0)), SingleRank(), device=cpu, dtype=getattr(torch, config.dtype),
        int8_layout=None if layout == "plain" else layout, max_batch_size=20, max_seq_len=1200,
    )
    int8_kv = config.quantization.kv_cache_quant_algo == "INT8"
    model.allocate_cache(1, 32, torch.int8 if int8_kv else getattr(torch, config.dtype))

    class Runner:
        def launch(self, inputs, sampled):
            tiles = context_tiles(inputs)
            data = torch.from_numpy(with_tiles(inputs, tiles))
            return model.forward(CudaBatch.of(data, inputs, len(tiles)), sampled)

    limits = SimpleNamespace(max_batch_size=20, max_num_tokens=1200, max_seq_len=1200, tokens_per_block=32)
    engine = SimpleNamespace(build_config=limits)
    print(warm_up.compile_kernels(Runner(), model, engine, cpu) > 10)
    late = []
    knobs.runtime.jit_cache_hook = lambda *, fn, **_: late.append(fn.name) or True
    warm_up._run_all(Runner(), engine, Sampler(1, cpu, lambda *a: choose_fused(*a).zero_(), penalize_fused))
    print(late)
"""


def run(script: str, cache: Path, *arguments: object) -> list[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(NO_CARD + script), *map(str, arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_kernels_are_compiled_before_anything_launches_them(tmp_path: Path) -> None:
    first, *kernels = run(TWO_KERNELS, tmp_path)
    assert first == "3 4"  # the same kernel twice is compiled once
    assert sorted(kernels) == ["_embed True True"] + 2 * ["_silu_mul True True"]


@pytest.mark.parametrize(
    "precision", [slow(name) for name in ("float16", "weight-only, sm80", "smoothquant, both", "int8 kv cache")]
)
def test_a_start_has_compiled_all_that_its_steps_launch(
    hf_directory: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    """Two layers of three launch all kernels, and what the rehearsal leaves out is nothing that a step needs."""
    options, _ = PRECISIONS[precision]
    source = hf_directory(num_hidden_layers=3, hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    settings = CheckpointRecipe(**options)
    if settings.calibrated:
        write_ranges(calibrate(HfModel(source), [list(range(60))]), tmp_path / "ranges.safetensors")
        settings = CheckpointRecipe(**options, act_ranges=str(tmp_path / "ranges.safetensors"))
    run_conversion(plan_conversion(source, settings), tmp_path / "checkpoint")
    assert run(WHOLE_START, tmp_path / "cache", tmp_path / "checkpoint", settings.int8_layout) == ["True", "[]"]

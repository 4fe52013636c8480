"""Compare the embedded engine with vLLM through `trtqwen compare`, on three workloads.

    TRTQWEN_VLLM_PYTHON=.venv-vllm/bin/python python scripts/compare_engines.py OUTPUT
    TRTQWEN_VLLM_PYTHON=PYTHON python scripts/compare_engines.py OUTPUT --random qwen2.5-7b --work /dev/shm/compare

The first line takes the bundled model in float32 on the CPU: about five minutes on two idle cores, most of them
vLLM's starts. The second line takes random weights of a known shape in float16, on one card. Random weights give
nearly equal logits to many tokens, so greedy answers of the two engines soon differ; compare answers with the bundled
model. The reports in docs/compare.md have their own commands.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from random_engine import make_checkpoint

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.triton.repository import write_repository

CPU = {"max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 512, "tokens_per_block": 32}
CPU_LOAD = ["--workload=smoke", "--workload=chat", "--workload=generation", "--input-tokens=64", "--output-tokens=48"]
CPU_LOAD += ["--requests=24", "--concurrency=4"]
CARD = {"max_batch_size": 256, "max_num_tokens": 8192, "max_seq_len": 4096, "tokens_per_block": 32}
CARD_LOAD = ["--workload=chat", "--workload=rag", "--workload=generation"]
CARD_LOAD += ["--requests=256", "--concurrency=64", "--processes=4"]


def main() -> None:
    """Build both engines and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--random", metavar="MODEL", help="take random weights in the shape of this known model")
    parser.add_argument("--work", type=Path, help="directory for checkpoint and engines; memory is fastest")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        home = Path(directory)
        if options.random:
            make_checkpoint(home / "checkpoint", options.random, "fp16", 1)
        else:
            run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="float32")), home / "checkpoint")
        limits, load = (CARD, CARD_LOAD) if options.random else (CPU, CPU_LOAD)
        for backend in ("torch", "vllm"):
            recipe = EngineRecipe.model_validate({"backend": backend, **limits})
            build_engine(home / "checkpoint", recipe, home / backend)
            serve = ServeRecipe(triton_max_batch_size=recipe.max_batch_size)
            write_repository(home / backend, serve, home / f"repository-{backend}")
        contenders = [f"embedded={home}/repository-torch", f"vllm={home}/repository-vllm"]
        words = ["compare", *contenders, *load, f"--output={options.output}", *more]
        subprocess.run([sys.executable, "-m", "trtqwen", *words], check=True)


if __name__ == "__main__":
    main()

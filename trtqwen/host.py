"""What this machine has: TensorRT-LLM and TensorRT (found, never imported), NVIDIA driver and GPUs, container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

IMAGE_VARIABLE = "TRTQWEN_IMAGE"  # set in the containers that trtqwen starts
_TENSORRT_PACKAGES = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
_DRIVER = Path("/proc/driver/nvidia/version")
_QUERY = ("index", "name", "compute_cap", "memory.total", "memory.used", "driver_version")


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi tells of it. Memory in MiB."""

    index: int
    name: str
    compute_capability: str
    memory_mib: int
    used_mib: int


@dataclass(frozen=True)
class Host:
    """This machine.

    Attributes:
        tensorrt_llm, tensorrt: installed versions; None where they are not.
        trtllm_build: the program, if it is on PATH.
        driver: the NVIDIA driver's version.
        image: the container image this runs in, as far as it is known.
    """

    tensorrt_llm: str | None = None
    tensorrt: str | None = None
    trtllm_build: Path | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    image: str | None = None


def read_host() -> Host:
    """Look at this machine; reads package metadata, asks nvidia-smi, imports nothing of NVIDIA's."""
    driver, gpus = _nvidia_smi()
    program = shutil.which("trtllm-build")
    return Host(
        tensorrt_llm=_installed(("tensorrt_llm",)),
        tensorrt=_installed(_TENSORRT_PACKAGES),
        trtllm_build=Path(program) if program else None,
        driver=driver or _kernel_driver(),
        gpus=gpus,
        image=_image(),
    )


def _installed(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _nvidia_smi() -> tuple[str | None, tuple[Gpu, ...]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, ()
    driver, gpus = None, []
    for line in filter(None, output.splitlines()):
        index, name, capability, total, used, driver = (field.strip() for field in line.split(","))
        gpus.append(Gpu(int(index), name, capability, int(total), int(used)))
    return driver, tuple(gpus)


def _kernel_driver() -> str | None:
    try:
        found = re.search(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)?)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def _image() -> str | None:
    if named := os.environ.get(IMAGE_VARIABLE):
        return named
    release = os.environ.get("NVIDIA_TRITON_SERVER_VERSION")  # set in NVIDIA's Triton images, such as 26.04
    return f"nvcr.io/nvidia/tritonserver:{release}-trtllm-python-py3" if release else None

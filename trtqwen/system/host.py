"""Facts about this machine: TensorRT-LLM and TensorRT (found, never imported), NVIDIA driver, GPUs, container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

IMAGE_VARIABLE = "TRTQWEN_IMAGE"  # set in the containers that trtqwen starts
DIGEST_VARIABLE = "TRTQWEN_IMAGE_DIGEST"
_TENSORRT_PACKAGES = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
_ASK = """
import sys
from importlib import metadata
installed = {(d.metadata["Name"] or "").replace("-", "_").lower(): d.version for d in metadata.distributions()}
for names in sys.argv[1:]:
    print(next((installed[name] for name in names.split(",") if name in installed), ""))
"""
_DRIVER = Path("/proc/driver/nvidia/version")
_QUERY = ("index", "name", "compute_cap", "memory.total", "memory.used", "driver_version")


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi reports it. Memory in MiB."""

    index: int
    name: str
    compute_capability: str
    memory_mib: int
    used_mib: int


@dataclass(frozen=True)
class Host:
    """This machine.

    Attributes:
        tensorrt_llm, tensorrt: installed versions; None if not installed.
        trtllm_build: the program, if it is on PATH.
        python: the interpreter that trtllm-build runs in; the versions are those of its packages.
        driver: the NVIDIA driver's version.
        image: container image of this process; None if unknown.
        image_digest: the same by digest, `name@sha256:...`.
    """

    tensorrt_llm: str | None = None
    tensorrt: str | None = None
    trtllm_build: Path | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    image: str | None = None
    image_digest: str | None = None
    python: Path | None = None

    @property
    def visible_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; ids other than numbers are only counted."""
        setting = os.environ.get("CUDA_VISIBLE_DEVICES")
        if setting is None:
            return self.gpus
        named = [entry.strip() for entry in setting.split(",") if entry.strip()]
        if not all(entry.isdecimal() for entry in named):
            return self.gpus[: sum(entry.startswith(("GPU-", "MIG-")) for entry in named)]
        by_index = {gpu.index: gpu for gpu in self.gpus}
        return tuple(by_index[int(entry)] for entry in named if int(entry) in by_index)


def read_host() -> Host:
    """Read the facts about this machine from package metadata and nvidia-smi. Imports no package of NVIDIA's."""
    driver, gpus = _nvidia_smi()
    found = shutil.which("trtllm-build")
    program = Path(found) if found else None
    python = _interpreter(program) if program else None
    tensorrt_llm, tensorrt = _versions(python)
    return Host(
        tensorrt_llm=tensorrt_llm,
        tensorrt=tensorrt,
        trtllm_build=program,
        driver=driver or _kernel_driver(),
        gpus=gpus,
        image=_image(),
        image_digest=os.environ.get(DIGEST_VARIABLE),
        python=python,
    )


def _interpreter(program: Path) -> Path | None:
    """Return the interpreter in a script's first lines; pip writes a long path into the second line."""
    try:
        with program.open("rb") as file:
            head = file.read(1024).decode(errors="replace")
    except OSError:
        return None
    named = re.search(r"/[^\s\"']*python[\d.]*", "\n".join(head.splitlines()[:2])) if head.startswith("#!") else None
    return Path(named[0]) if named and Path(named[0]).is_file() else None


def _versions(python: Path | None) -> tuple[str | None, str | None]:
    """TensorRT-LLM and TensorRT as `python` sees them, else as this interpreter does."""
    if python is None or python == Path(sys.executable):
        return _installed(("tensorrt_llm",)), _installed(_TENSORRT_PACKAGES)
    command = [str(python), "-c", _ASK, "tensorrt_llm", ",".join(_TENSORRT_PACKAGES)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    tensorrt_llm, tensorrt = (line or None for line in answer[-2:])  # a start-up file may have spoken before
    return tensorrt_llm, tensorrt


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
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == len(_QUERY):  # not a remark such as "No devices were found"
            index, name, capability, total, used, driver = fields
            gpus.append(Gpu(int(index), name, capability, _mib(total), _mib(used)))
    return driver, tuple(gpus)


def _mib(field: str) -> int:
    """Parse a memory size; GPUs that share the host's memory report [N/A]."""
    return int(field) if field.isdecimal() else 0


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

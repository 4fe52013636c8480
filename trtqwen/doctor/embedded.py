"""Requirements of the embedded engine on this host's GPUs: PyTorch, its CUDA, and those of its kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trtqwen.diagnostics import Diagnostic
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.recipe import Recipe

_SECONDS = 120
_COMPILERS = ("gcc", "clang", "cc")  # the Triton language takes the first, or $CC
# In a process of its own: a CUDA context would stay in doctor's, and a broken library would end it.
_PROBE = """
import json, torch
cuda = torch.version.cuda
found = cuda is not None and torch.cuda.is_available()
devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())] if found else []
print(json.dumps([torch.__version__, cuda, devices, torch.cuda.get_arch_list() if found else []]))
"""


@dataclass(frozen=True)
class TorchFacts:
    """Facts about PyTorch and the system.

    Attributes:
        cuda: CUDA's version that PyTorch was built for; None for a CPU build.
        devices: compute capability of each device that PyTorch sees.
        architectures: GPU architectures that its kernels were compiled for, such as `sm_90`.
        triton: whether the Triton language is installed.
        compiler: a C compiler; None without one.
        headers: whether Python.h exists.
    """

    version: str
    cuda: str | None
    devices: tuple[tuple[int, int], ...]
    architectures: tuple[str, ...]
    triton: bool
    compiler: str | None
    headers: bool


class EmbeddedDevice(Check):
    """PyTorch sees the cards that the recipe needs and has kernels for them.

    The engine's own kernels can be compiled here.
    """

    id = "D42"
    level = "error"
    title = "PyTorch of the embedded engine"

    def run(self, subject: Subject) -> Result:
        recipe = subject.named_recipe
        if recipe.engine.backend != "torch":
            raise Skip(f"the recipe's backend is {recipe.engine.backend}")
        if importlib.util.find_spec("torch") is None:
            return self.found("PyTorch is not installed", "`pip install 'trtqwen[torch]'`")
        wanted = recipe.serve.device
        if wanted == "cpu" or (wanted == "auto" and not subject.host.gpus):
            return Result("ok", "the engine computes on the CPU")
        facts = _read_facts()
        if isinstance(facts, str):
            return self.found(
                f"PyTorch cannot be imported: {facts}", "install it again with the CUDA build that fits"
            )
        cards = ", ".join(f"sm_{major}{minor}" for major, minor in facts.devices)
        return self.judge(
            list(problems(facts, recipe)),
            f"PyTorch {facts.version}, CUDA {facts.cuda}, {cards}, kernels by {facts.compiler}",
        )


def problems(facts: TorchFacts, recipe: Recipe) -> Iterator[Diagnostic]:
    """Return the problems that prevent the engine from running on this host's GPUs, or make it slow."""
    if facts.cuda is None:
        where = "cannot start" if recipe.serve.device == "cuda" else "would compute on the CPU"
        yield Diagnostic(
            f"PyTorch {facts.version} is a CPU build: the engine {where}",
            "install the CUDA build of PyTorch that fits the driver, from pytorch.org",
        )
        return
    if not facts.devices:
        yield Diagnostic(
            f"PyTorch's CUDA {facts.cuda} finds no device",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES; CUDA 12 needs driver 525 or newer, CUDA 13 needs 580",
        )
        return
    needed = recipe.world_size * recipe.serve.replicas
    if needed > len(facts.devices):
        yield Diagnostic(
            f"the recipe needs {needed} CUDA devices, and PyTorch sees {len(facts.devices)}",
            "lower checkpoint.tp_size or serve.replicas, or show it more cards with CUDA_VISIBLE_DEVICES",
        )
    for major, minor in dict.fromkeys(facts.devices):
        if not _runs_on(facts.architectures, major, minor):
            yield Diagnostic(
                f"PyTorch {facts.version} has no kernels for compute capability {major}.{minor}, only for "
                f"{', '.join(facts.architectures)}",
                "install a newer build of PyTorch",
            )
    if not facts.triton:
        yield Diagnostic(
            "the Triton language is not installed: PyTorch's own operators are used, which are slower",
            "`pip install triton`",
            "warning",
        )
        return
    if facts.compiler is None:
        yield Diagnostic("there is no C compiler, which the kernels need", "install gcc, or set CC to a compiler")
    if not facts.headers:
        yield Diagnostic(
            "Python.h is missing, which the kernels are compiled with",
            f"install the development files of Python {sys.version_info.major}.{sys.version_info.minor}",
        )


def _runs_on(architectures: tuple[str, ...], major: int, minor: int) -> bool:
    """Kernels run on later minors of their major version; PTX (`compute_90`) is compiled for any later card."""
    for name in architectures:
        kind, _, number = name.rstrip("af").partition("_")
        built = divmod(int(number), 10)
        if (kind == "compute" and built <= (major, minor)) or (built[0] == major and built[1] <= minor):
            return True
    return False


def _read_facts() -> TorchFacts | str:
    """Read the facts; return the last line of the error if PyTorch cannot be imported."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_SECONDS, cwd="/"
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS} s"
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    version, cuda, devices, architectures = json.loads(done.stdout.splitlines()[-1])
    compilers = (os.environ.get("CC"), *_COMPILERS)
    return TorchFacts(
        version=version,
        cuda=cuda,
        devices=tuple((major, minor) for major, minor in devices),
        architectures=tuple(architectures),
        triton=importlib.util.find_spec("triton") is not None,
        compiler=next((found for name in compilers if name and (found := shutil.which(name))), None),
        headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
    )


CHECKS: tuple[Check, ...] = (EmbeddedDevice(),)

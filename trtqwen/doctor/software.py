"""Checks of the installed TensorRT-LLM, TensorRT and driver, and of their environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from trtqwen.diagnostics import Diagnostic
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.engine.gates import advisory_problem, driver_problem
from trtqwen.facts.cards import has_peer_to_peer
from trtqwen.facts.releases import (
    Image,
    known_image,
    known_release,
    last_engine_release,
    newest_image,
    release_facts,
    version,
)
from trtqwen.triton.environment import FOREIGN_LAUNCHERS

_BACKEND = Path("opt/tritonserver/backends/tensorrtllm/libtriton_tensorrtllm.so")


class EnginePath(Check):
    """The installed release of TensorRT-LLM builds engines, and its Triton can serve them.

    1.2.1 is the last one that does.
    """

    id = "D02"
    level = "error"
    title = "TensorRT-LLM installation"

    def run(self, subject: Subject) -> Result:
        host, system = subject.host, subject.system
        last = last_engine_release()
        image = _last_image()
        if host.tensorrt_llm is None:
            raise Skip(f"no TensorRT-LLM here; engines are built in {image}")
        if version(host.tensorrt_llm)[:2] > version(last)[:2]:
            text = f"TensorRT-LLM {host.tensorrt_llm}: upstream removed the engine path in summer 2026, after {last}"
            return self.found(text, f"use {image}, or serve the model with upstream's llmapi")
        problems = []
        if host.trtllm_build is None:
            problems.append(Diagnostic("trtllm-build is not on PATH", f"use {image}, unchanged"))
        if _build_config_is_gone():
            problems.append(Diagnostic("tensorrt_llm/builder.py has no BuildConfig", f"use {image}, unchanged"))
        triton = (system.root / "opt/tritonserver/bin/tritonserver").is_file()
        if triton and not (system.root / _BACKEND).is_file():
            text = f"this Triton has no {_BACKEND.name}: it cannot serve engines"
            problems.append(Diagnostic(text, "use an image whose tag ends in -trtllm-python-py3"))
        return self.judge(problems, f"TensorRT-LLM {host.tensorrt_llm}, {host.trtllm_build}")


def _last_image() -> str:
    return newest_image(last_engine_release()).image


def _build_config_is_gone() -> bool:
    package = importlib.util.find_spec("tensorrt_llm")  # finds the package, does not import it
    if package is None or package.origin is None:
        return False
    builder = Path(package.origin).with_name("builder.py")
    return not builder.is_file() or "class BuildConfig" not in builder.read_text(encoding="utf-8")


class TensorRtVersion(Check):
    """TensorRT is version 10, and the one that the installed TensorRT-LLM was built with."""

    id = "D03"
    level = "error"
    title = "TensorRT version"

    def run(self, subject: Subject) -> Result:
        installed, llm = subject.host.tensorrt, subject.host.tensorrt_llm
        if installed is None:
            raise Skip("no TensorRT here")
        if version(installed)[:1] != (10,):
            text = f"TensorRT {installed}: engines of TensorRT-LLM need TensorRT 10"
            return self.found(text, f"use {_last_image()}")
        release = known_release(llm)
        pinned = release_facts(release).tensorrt if release else None
        if pinned is not None and version(installed)[:2] != version(pinned):
            text = f"TensorRT {installed} with TensorRT-LLM {llm}, which pins {pinned}"
            return self.found(text, "a left-over or an upgrade by hand: use the image as it came")
        return Result("ok", f"TensorRT {installed}")


class Driver(Check):
    """The driver is new enough for the CUDA of the image."""

    id = "D05"
    level = "error"
    title = "NVIDIA driver"

    def run(self, subject: Subject) -> Result:
        driver = subject.host.driver
        if driver is None:
            raise Skip("no NVIDIA driver here")
        image = _image(subject)
        problem = driver_problem(driver, image, [gpu.name for gpu in subject.host.gpus])
        tag = image.image.partition(":")[2]
        return self.judge([problem] if problem else [], f"driver {driver}, {tag} was built with {image.driver}")


class Advisories(Check):
    """The image has no known security advisory."""

    id = "D41"
    level = "warning"
    title = "security advisories of the image"

    def run(self, subject: Subject) -> Result:
        if subject.host.image is None and not subject.host.gpus:
            raise Skip("no image of NVIDIA runs here")
        image = _image(subject)
        problem = advisory_problem(image)
        return self.judge([problem] if problem else [], f"none is known of {image.image.rpartition(':')[2]}")


def _image(subject: Subject) -> Image:
    """Return the image of this container if it is known, otherwise the newest image with the recipe's release."""
    release = subject.recipe.checkpoint.release if subject.recipe else last_engine_release()
    return known_image(subject.host.image) or newest_image(release)


class Environment(Check):
    """No environment variable sends NCCL, CUDA or MPI another way than the recipe needs."""

    id = "D08"
    level = "warning"
    title = "environment variables"

    def run(self, subject: Subject) -> Result:
        environ = subject.system.environ
        problems = []
        hijacked = sorted(name for name in environ if name.startswith(FOREIGN_LAUNCHERS))
        if hijacked:
            text = f"{', '.join(hijacked)}: another launcher's, which mpi4py and mpirun obey"
            problems.append(Diagnostic(text, f"env {' '.join(f'-u {name}' for name in hijacked)} trtqwen ..."))
        if environ.get("NCCL_SHM_DISABLE", "0") != "0":
            text = "NCCL_SHM_DISABLE is set: without peer-to-peer, NCCL falls back to sockets"
            problems.append(Diagnostic(text, "unset NCCL_SHM_DISABLE"))
        problems += _peer_to_peer(subject) + _visible(subject)
        seen = sorted(name for name in environ if name.startswith(("NCCL_", "CUDA_VISIBLE_DEVICES")))
        return self.judge(problems, ", ".join(f"{name}={environ[name]}" for name in seen) or "nothing in the way")


def _peer_to_peer(subject: Subject) -> list[Diagnostic]:
    """GeForce drivers have no peer-to-peer, and some say they had: NCCL then hangs or hands out wrong data.

    `trtqwen serve` and containers that trtqwen starts switch it off where it is not set.
    """
    cards = [gpu for gpu in subject.host.gpus if not has_peer_to_peer(gpu.name)]
    if len(cards) > 1 and subject.engine_ranks > 1 and subject.system.environ.get("NCCL_P2P_DISABLE") == "0":
        text = f"NCCL_P2P_DISABLE=0 lets NCCL try peer access between {len(cards)} GeForce cards, which have none"
        return [Diagnostic(text, "unset NCCL_P2P_DISABLE: trtqwen then sets it to 1")]
    return []


def _visible(subject: Subject) -> list[Diagnostic]:
    value = subject.system.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None or not subject.host.gpus:
        return []
    visible = 0 if value.strip() in ("", "-1", "NoDevFiles") else len(value.split(","))
    if visible >= subject.local_ranks:
        return []
    text = f"CUDA_VISIBLE_DEVICES={value!r} shows {visible} GPUs, {subject.local_ranks} ranks are to run here"
    return [Diagnostic(text, "unset CUDA_VISIBLE_DEVICES or name a GPU for each rank")]


CHECKS: tuple[Check, ...] = (EnginePath(), TensorRtVersion(), Driver(), Environment(), Advisories())

"""Checks of the host's requirements for NVIDIA's image."""

from __future__ import annotations

import shutil
from pathlib import Path

from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.engine.provenance import read_provenance
from trtqwen.facts.releases import image_size_gb, last_engine_release, newest_image

_TOOLS = ("nvidia-container-runtime-hook", "nvidia-ctk", "nvidia-container-cli")
_UNPACKING = 3  # the layers compressed, and unpacked to about twice that
_GB = 10**9


class ContainerToolkit(Check):
    """Docker runs here, and its containers can see the GPUs."""

    id = "D35"
    level = "error"
    title = "docker and GPU containers"
    place = "host"

    def run(self, subject: Subject) -> Result:
        _need_containers(subject)
        runtimes = _docker(subject, "info", "--format={{json .Runtimes}}")
        if runtimes is None:
            return self.found("docker's daemon does not answer", "start docker, and join its group")
        path = subject.system.environ.get("PATH")
        if "nvidia" in runtimes or any(shutil.which(tool, path=path) for tool in _TOOLS):
            return Result("ok", "NVIDIA Container Toolkit is installed")
        return self.found(
            "docker has no NVIDIA runtime: containers see no GPU",
            "install nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker`, restart docker",
        )


class ImageRoom(Check):
    """Docker's disk holds the image that builds and serves, also while it is unpacked."""

    id = "D36"
    level = "error"
    title = "disk for the image"
    place = "host"

    def run(self, subject: Subject) -> Result:
        _need_containers(subject)
        image = _image(subject)
        if _docker(subject, "image", "inspect", "--format={{.Id}}", image):
            return Result("ok", f"{image} is here")
        root = (_docker(subject, "info", "--format={{.DockerRootDir}}") or "").strip()
        if not root:
            raise Skip("docker's daemon does not answer, see D35")
        free, needed = subject.system.disk_usage(Path(root))[2], _UNPACKING * image_size_gb() * _GB
        if free < needed:
            text = (
                f"{root} has {free / _GB:.0f} GB free, the image takes about {needed / _GB:.0f} while it is unpacked"
            )
            return self.found(text, "make room, or move docker's data-root to another disk")
        return Result("ok", f"{root} has {free / _GB:.0f} GB free, the image takes about {needed / _GB:.0f}")


class ImageDigest(Check):
    """A tag can be pushed again, with another TensorRT; an engine runs with the one that built it."""

    id = "D40"
    level = "warning"
    title = "image that built the engine"
    place = "host"

    def run(self, subject: Subject) -> Result:
        record = read_provenance(subject.named_engine)
        if record is None or record.image is None:
            raise Skip("the engine was not built in an image")
        if record.image_digest is None:
            return Result("ok", f"built in {record.image}, whose digest was not recorded")
        names = (
            _docker(subject, "image", "inspect", '--format={{join .RepoDigests " "}}', record.image) or ""
        ).split()
        if not names:
            raise Skip(f"docker does not have {record.image}")
        if record.image_digest in names:
            return Result("ok", record.image_digest)
        return self.found(
            f"the engine was built in {record.image_digest}, and {record.image} is now {names[0]}",
            f"serve with --image {record.image_digest}, or build the engine again",
        )


def _need_containers(subject: Subject) -> None:
    if not subject.starts_containers:
        raise Skip("TensorRT-LLM is here: no container is started")
    if not subject.host.gpus:
        raise Skip("no GPU here")
    if shutil.which("docker", path=subject.system.environ.get("PATH")) is None:
        raise Skip("no docker here")


def _image(subject: Subject) -> str:
    return newest_image(subject.recipe.checkpoint.release if subject.recipe else last_engine_release()).image


def _docker(subject: Subject, *arguments: str) -> str | None:
    return subject.system.output("docker", *arguments)


CHECKS: tuple[Check, ...] = (ContainerToolkit(), ImageRoom(), ImageDigest())

"""The `docker run` line: options, environment and mounts of a container."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from trtqwen.containers.image import choose_image
from trtqwen.containers.installed import HOME, PACKAGE, START_INSIDE, pins, requirements
from trtqwen.containers.work import ContainerOptions, Work
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.recipe import CHECKOUT
from trtqwen.system.cache import user_cache
from trtqwen.system.host import IMAGE_VARIABLE

CACHE = Path("/var/cache/trtqwen")  # where the start script keeps its virtual environment


@dataclass(frozen=True)
class ContainerPlan:
    """A container to run.

    Attributes:
        options: those of `docker run`, each one word.
        arguments: trtqwen's.
        writable: mounted directories that the container writes to; they must exist.
        warnings: problems that do not prevent the start.
    """

    image: str
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    writable: tuple[Path, ...]
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def command(self) -> list[str]:
        return ["docker", "run", *self.options, self.image, START_INSIDE, *self.arguments]

    def shell(self) -> str:
        """Return the command for a shell, one option per line."""
        words = [shlex.join(self.command[:2]), *map(shlex.quote, self.options), shlex.quote(self.image)]
        return " \\\n  ".join([*words, shlex.join(self.command[len(self.options) + 3 :])])


def plan_container(work: Work, options: ContainerOptions) -> ContainerPlan:
    """Plan the `docker run` of a command in the image of its release.

    Raises:
        InputError: if no image or driver suits it, or a directory that it reads does not exist.
    """
    image, warnings = choose_image(work, options)
    needs = " ".join(requirements())
    cache = _cache_directory(image, needs)
    docker = ["--rm", "--init", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"]
    docker += ["--cap-drop=ALL", "--security-opt=no-new-privileges"]
    if work.gpus is None:
        docker.append("--gpus=all")
    elif work.gpus:
        devices = ",".join(map(str, range(work.gpus)))
        docker.append(f'--gpus="device={devices}"')  # to docker, a comma outside quotes begins a new field
    if work.network:
        docker.append(f"--network={work.network}")
    docker += [f"--user={os.getuid()}:{os.getgid()}", f"--workdir={Path.cwd()}", "--entrypoint=bash"]
    docker += [f"--env={name}={value}" for name, value in _environment(work, image, needs, options).items()]
    mounts = {HOME / PACKAGE.name: (PACKAGE, False)}
    for path in [*work.read, *([options.wheels] if options.wheels else [])]:
        if not path.exists():
            raise InputError(f"{path}: does not exist, but the container has to read it", "check the path")
        mounts[path.resolve()] = path.resolve(), False
    if CHECKOUT.is_dir():
        mounts[HOME / CHECKOUT.name] = (CHECKOUT, False)
    mounts |= {path: (path, True) for path in work.write} | {CACHE: (cache, True)}
    docker += [_mount(source, target, writable) for target, (source, writable) in mounts.items()]
    return ContainerPlan(image, tuple(docker), tuple(work.arguments), (*work.write, cache), warnings)


def _environment(work: Work, image: str, needs: str, options: ContainerOptions) -> dict[str, str]:
    environment = {
        IMAGE_VARIABLE: image,
        "HOME": "/tmp",  # the user has no entry in the image's passwd: caches go by HOME, torch asks for USER
        "USER": "trtqwen",
        "PYTHONPATH": str(HOME),
        "PYTHONSAFEPATH": "1",  # a module of the working directory, such as a downloaded model's, is never imported
        "TRTQWEN_REQUIRES": needs,
        "TRTQWEN_PINS": " ".join(pins()),
        "PIP_CONSTRAINT": "",  # NVIDIA's pins are for the image's own packages
    }
    if options.wheels:
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": options.wheels.resolve().as_uri()}
    if work.ranks > 1:
        environment["NCCL_DEBUG"] = "WARN"
        if not work.peer_to_peer:
            environment["NCCL_P2P_DISABLE"] = "1"  # then NCCL goes through shared memory: never disable that
    return environment


def _cache_directory(image: str, needs: str) -> Path:
    """Return the host's directory for the virtual environment of an image, so that only the first start installs."""
    key = hashlib.sha256(f"{image} {needs}".encode()).hexdigest()[:16]
    return user_cache("containers") / key


def _mount(source: Path, target: Path, writable: bool) -> str:
    fields = ["type=bind", f"source={source}", f"target={target}", *([] if writable else ["readonly"])]
    return "--mount=" + ",".join(map(csv_field, fields))


def csv_field(text: str) -> str:
    """Quote a field of a `--mount` option if it holds a comma or a quote."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"') else text

"""The `docker run` line that runs trtqwen in NVIDIA's image of the recipe's TensorRT-LLM release."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from trtqwen.artifact import make_directory, read_manifest
from trtqwen.diagnostics import ContainerError, InputError
from trtqwen.facts.cards import card_facts
from trtqwen.facts.releases import Image, images, newest_image, newest_image_for, version
from trtqwen.recipe import CHECKOUT, Recipe
from trtqwen.system.host import IMAGE_VARIABLE

_PACKAGE = Path(__file__).parent
_HOME = Path("/opt/trtqwen")
# A virtual environment takes the requirements that the image lacks; trtllm-build and Triton keep the image's own.
_START = """\
set -f
python3 -m venv --system-site-packages --without-pip /tmp/venv
python3 -m pip --python /tmp/venv/bin/python install --quiet $TRTQWEN_REQUIRES >&2 || exit
exec /tmp/venv/bin/python -m trtqwen "$@"
"""


@dataclass(frozen=True)
class ContainerOptions:
    """What a user says about the container.

    Attributes:
        image: an image by tag or digest, in place of the newest with the recipe's release.
        wheels: directory to install from what the image lacks, in place of the network.
        driver: the host's NVIDIA driver; None if it is not known.
    """

    image: str | None = None
    wheels: Path | None = None
    driver: str | None = None


@dataclass(frozen=True)
class ContainerPlan:
    """A container to run.

    Attributes:
        options: those of `docker run`, each one word.
        arguments: trtqwen's.
        writable: mounted directories that are written to; they have to exist.
    """

    image: str
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    writable: tuple[Path, ...]

    @property
    def command(self) -> list[str]:
        return ["docker", "run", *self.options, self.image, "-c", _START, "trtqwen", *self.arguments]

    def shell(self) -> str:
        """The command for a shell: an option a line, to be read and pasted."""
        words = [shlex.join(self.command[:2]), *map(shlex.quote, self.options), shlex.quote(self.image)]
        return " \\\n  ".join([*words, shlex.join(self.command[len(self.options) + 3 :])])


def plan_build_container(
    name: str,
    recipe: Recipe,
    model: Path,
    engines: Path,
    repository: Path,
    flags: Sequence[str],
    options: ContainerOptions,
) -> ContainerPlan:
    """The container of `trtqwen build`.

    Args:
        name: the recipe as the user named it: a name or a file.
        flags: further arguments of the command.

    Raises:
        InputError: if no image has the recipe's release, the driver is too old for it, or a path does not exist.
    """
    model, engines, repository = model.resolve(), engines.resolve(), repository.resolve()
    named, recipe_files = _recipe_argument(name)
    calibration = [Path(file) for file in (recipe.checkpoint.calib, recipe.checkpoint.act_ranges) if file]
    return _plan(
        recipe,
        ["build", named, f"--model={model}", f"--engines={engines}", f"--repo={repository}", *flags],
        read=[model, *_link_targets(model), *recipe_files, *calibration],
        write=[engines, repository.parent],  # a repository is renamed into place beside itself
        gpus=recipe.world_size,
        options=options,
    )


def plan_serve_container(
    recipe: Recipe,
    repository: Path,
    flags: Sequence[str],
    files: Sequence[Path],
    log: Path | None,
    options: ContainerOptions,
) -> ContainerPlan:
    """The container of `trtqwen serve`, in the host's network: addresses and ports mean what they mean outside.

    Args:
        files: that the flags name.

    Raises:
        InputError: as `plan_build_container`, or if the repository is not finished.
    """
    repository = repository.resolve()
    engine = read_manifest(repository, "repository").parameters.get("engine")
    if not isinstance(engine, str):
        raise InputError(f"{repository}: its manifest names no engine", "write it again with `trtqwen repo`")
    flags = [*flags, f"--log={log.resolve()}"] if log else flags
    return _plan(
        recipe,
        ["serve", f"--repo={repository}", *flags],
        read=[repository, Path(engine), *files],
        write=[log.resolve().parent] if log else [],
        gpus=recipe.world_size * recipe.serve.replicas,
        options=options,
        network="host",
    )


def run_container(plan: ContainerPlan) -> NoReturn:
    """Become `docker run`: its exit code is the command's, and signals reach the container through it.

    Raises:
        ContainerError: if docker is not there or its daemon does not answer.
        OutputError: if a directory to write to cannot be created.
    """
    if shutil.which("docker") is None:
        raise ContainerError("docker is not on PATH", "install it, or run trtqwen in the container yourself")
    answer = subprocess.run(["docker", "version"], capture_output=True, text=True)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ContainerError(f"docker's daemon does not answer ({reason})", "start it, or join its group")
    for directory in plan.writable:
        make_directory(directory)  # docker's daemon would make it root's
    sys.stdout.flush()
    os.execvp("docker", plan.command)


def _plan(
    recipe: Recipe,
    arguments: Sequence[str],
    *,
    read: Iterable[Path],
    write: Sequence[Path],
    gpus: int,
    options: ContainerOptions,
    network: str | None = None,
) -> ContainerPlan:
    image = _choose_image(recipe, options)
    docker = ["--rm", "--init", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"]
    if recipe.engine.backend == "tensorrt_llm":
        devices = ",".join(map(str, range(gpus)))
        docker.append(f'--gpus="device={devices}"')  # to docker, a comma outside quotes begins a new field
    if network:
        docker.append(f"--network={network}")
    docker += [f"--user={os.getuid()}:{os.getgid()}", f"--workdir={Path.cwd()}", "--entrypoint=bash"]
    docker += [f"--env={name}={value}" for name, value in _environment(recipe, image, options).items()]
    mounts = {_HOME / _PACKAGE.name: (_PACKAGE, False)}
    for path in [*read, *([options.wheels] if options.wheels else [])]:
        if not path.exists():
            raise InputError(f"{path}: does not exist, but the container has to read it", "check the path")
        mounts[path.resolve()] = path.resolve(), False
    if CHECKOUT.is_dir():
        mounts[_HOME / CHECKOUT.name] = (CHECKOUT, False)
    mounts |= {path: (path, True) for path in write}
    docker += [_mount(source, target, writable) for target, (source, writable) in mounts.items()]
    return ContainerPlan(image, tuple(docker), tuple(arguments), tuple(write))


def _choose_image(recipe: Recipe, options: ContainerOptions) -> str:
    """The image to run, once the driver and the recipe's release are known to suit it."""
    release = recipe.checkpoint.release
    try:
        known = _known(options.image) if options.image else newest_image(release)
    except KeyError:
        raise InputError(
            f"recipe {recipe.name}: no known image holds checkpoint.release {release}", "name one with --image"
        ) from None
    if known is None:
        return str(options.image)
    if known.tensorrt_llm != release:
        raise InputError(
            (
                f"{known.image}: holds TensorRT-LLM {known.tensorrt_llm}, but the recipe's "
                f"checkpoint.release is {release}"
            ),
            "name another image or release",
        )
    if recipe.engine.backend == "tensorrt_llm" and options.driver and version(options.driver) < version(known.driver):
        raise InputError(_old_driver(options.driver, known))
    return options.image or known.image


def _known(image: str) -> Image | None:
    return next((known for known in images() if known.image == image), None)


def _old_driver(driver: str, image: Image) -> str:
    runs = newest_image_for(driver)
    remedy = f", or set checkpoint.release {runs.tensorrt_llm} for {runs.image}, the newest it runs" if runs else ""
    return (
        f"{image.image}: needs NVIDIA driver {image.driver} or newer, here is {driver}, and GeForce cards have no "
        f"forward compatibility; update the driver{remedy}"
    )


def _environment(recipe: Recipe, image: str, options: ContainerOptions) -> dict[str, str]:
    environment = {
        IMAGE_VARIABLE: image,
        "HOME": "/tmp",  # the user has no entry in the image's passwd: caches go by HOME, torch asks for USER
        "USER": "trtqwen",
        "PYTHONPATH": str(_HOME),
        "TRTQWEN_REQUIRES": " ".join(_requirements()),
        "PIP_CONSTRAINT": "",  # NVIDIA's pins are for the image's own packages
    }
    if options.wheels:
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": options.wheels.resolve().as_uri()}
    if recipe.world_size > 1 and recipe.host is not None:
        environment["NCCL_DEBUG"] = "WARN"
        if not card_facts(recipe.host.card).peer_to_peer:
            environment["NCCL_P2P_DISABLE"] = "1"  # then NCCL goes through shared memory: never disable that
    return environment


def _requirements() -> list[str]:
    """What trtqwen's package needs, without its extras; no word has a space."""
    try:
        requirements = metadata.requires("trtqwen") or []
    except metadata.PackageNotFoundError:
        raise InputError(
            "trtqwen is not installed as a package here", "`pip install` it, so that its needs are known"
        ) from None
    return [requirement.replace(" ", "") for requirement in requirements if "extra ==" not in requirement]


def _recipe_argument(name: str) -> tuple[str, list[Path]]:
    """The recipe as the container is to be told, and what to mount for it."""
    path = Path(name)
    return (str(path.resolve()), [path]) if path.is_file() else (name, [])


def _link_targets(directory: Path) -> list[Path]:
    """Where the links of a directory lead, such as those of a Hugging Face cache to its blobs."""
    return sorted({path.resolve().parent for path in directory.glob("*") if path.is_symlink()})


def _mount(source: Path, target: Path, writable: bool) -> str:
    fields = ["type=bind", f"source={source}", f"target={target}", *([] if writable else ["readonly"])]
    return "--mount=" + ",".join(map(_csv_field, fields))


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"') else text

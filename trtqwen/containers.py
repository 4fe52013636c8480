"""The `docker run` line that runs trtqwen in NVIDIA's image of a TensorRT-LLM release."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from trtqwen.artifact.directory import make_directory
from trtqwen.artifact.manifest import read_manifest
from trtqwen.diagnostics import ContainerError, Diagnostic, InputError
from trtqwen.engine.gates import advisory_problem, driver_problem
from trtqwen.facts.cards import card_facts
from trtqwen.facts.names import Release
from trtqwen.facts.releases import known_image, last_engine_release, newest_image, version
from trtqwen.facts.vllm import known_vllm_image, vllm_image
from trtqwen.recipe import CHECKOUT, Recipe, VllmSettings
from trtqwen.system.host import DIGEST_VARIABLE, IMAGE_VARIABLE, Host

PACKAGE = Path(__file__).parent
HOME = Path("/opt/trtqwen")
START = Path(__file__).with_name("container_start.sh")
CACHE = Path("/var/cache/trtqwen")  # where the start script keeps its virtual environment


@dataclass(frozen=True)
class ContainerOptions:
    """What a user and the host say about the container.

    Attributes:
        image: an image by tag or digest, in place of the newest with the recipe's release.
        wheels: directory to install from what the image lacks, in place of the network.
        driver: the host's NVIDIA driver; None if it is not known.
        gpus: names of the host's GPUs.
        skip_gates: turn a refusal of driver or image into a warning.
    """

    image: str | None = None
    wheels: Path | None = None
    driver: str | None = None
    gpus: tuple[str, ...] = ()
    skip_gates: bool = False


def container_options(
    host: Host, image: str | None = None, wheels: Path | None = None, *, skip_gates: bool = False
) -> ContainerOptions:
    """The options of a user on this host."""
    return ContainerOptions(image, wheels, host.driver, tuple(gpu.name for gpu in host.gpus), skip_gates)


@dataclass(frozen=True)
class ContainerPlan:
    """A container to run.

    Attributes:
        options: those of `docker run`, each one word.
        arguments: trtqwen's.
        writable: mounted directories that are written to; they have to exist.
        warnings: what is not as it should be and does not keep it from starting.
    """

    image: str
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    writable: tuple[Path, ...]
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def command(self) -> list[str]:
        start = f"{HOME}/{PACKAGE.name}/{START.name}"
        return ["docker", "run", *self.options, self.image, start, *self.arguments]

    def shell(self) -> str:
        """The command for a shell: an option a line, to be read and pasted."""
        words = [shlex.join(self.command[:2]), *map(shlex.quote, self.options), shlex.quote(self.image)]
        return " \\\n  ".join([*words, shlex.join(self.command[len(self.options) + 3 :])])


@dataclass(frozen=True)
class _Work:
    """What runs in a container.

    Attributes:
        release: of TensorRT-LLM that the image has to hold.
        gpus: how many, from the first on; None for all of them.
        ranks: of one engine; more than one talk through NCCL.
        peer_to_peer: whether the cards can read each other's memory.
        vllm: release of vLLM that the image has to hold instead; None for TensorRT-LLM.
    """

    arguments: Sequence[str]
    release: Release
    gpus: int | None
    ranks: int = 1
    peer_to_peer: bool = True
    vllm: str | None = None
    read: Iterable[Path] = ()
    write: Sequence[Path] = ()
    network: str | None = None


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
    work = _recipe_work(
        recipe,
        ["build", named, f"--model={model}", f"--engines={engines}", f"--repo={repository}", *flags],
        gpus=recipe.world_size,
    )
    read = [model, *_link_targets(model), *recipe_files, *calibration]
    # A repository is renamed into place within its parent.
    return _plan(replace(work, read=read, write=[engines, repository.parent]), options)


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
    work = _recipe_work(
        recipe, ["serve", f"--repo={repository}", *flags], gpus=recipe.world_size * recipe.serve.replicas
    )
    write = [log.resolve().parent] if log else []
    return _plan(replace(work, read=[repository, Path(engine), *files], write=write, network="host"), options)


def plan_doctor_container(
    name: str | None,
    recipe: Recipe | None,
    flags: Sequence[str],
    read: Sequence[Path],
    options: ContainerOptions,
) -> ContainerPlan:
    """The container of `trtqwen doctor`: the checks of what the image holds, on the recipe's GPUs or on all.

    Args:
        read: directories that the flags name.

    Raises:
        InputError: as `plan_build_container`.
    """
    named, recipe_files = _recipe_argument(name) if name else (None, [])
    arguments = ["doctor", *([named] if named else []), *flags]
    links = [target for directory in read for target in _link_targets(directory)]
    if recipe is None:
        work = _Work(arguments, last_engine_release(), gpus=None)
    else:
        work = _recipe_work(recipe, arguments, gpus=recipe.world_size * recipe.serve.replicas)
    return _plan(replace(work, read=[*read, *links, *recipe_files], network="host"), options)


def plan_selftest_container(release: Release, engines: Path, json: bool, options: ContainerOptions) -> ContainerPlan:
    """The container of `trtqwen selftest`, on the first GPU.

    Raises:
        InputError: as `plan_build_container`.
    """
    engines = engines.resolve()
    arguments = ["selftest", f"--engines={engines}", *(["--json"] if json else [])]
    return _plan(_Work(arguments, release, gpus=1, write=[engines]), options)


def run_container(plan: ContainerPlan) -> NoReturn:
    """Become `docker run`: its exit code is the command's, and signals reach the container through it.

    Raises:
        ContainerError, OutputError: as `prepared`.
    """
    plan = prepared(plan)
    sys.stdout.flush()
    os.execvp("docker", plan.command)


def prepared(plan: ContainerPlan) -> ContainerPlan:
    """The plan with the image by digest, if docker has it; its directories exist then.

    Raises:
        ContainerError: if docker is not there or its daemon does not answer.
        OutputError: if a directory to write to cannot be created.
    """
    check_docker()
    for directory in plan.writable:
        make_directory(directory)  # docker's daemon would make it root's
    digest = image_digest(plan.image)
    if digest is None:
        return plan
    # A tag can be pushed again.
    return replace(plan, image=digest, options=(*plan.options, f"--env={DIGEST_VARIABLE}={digest}"))


def check_docker() -> None:
    """Raise a ContainerError if docker is not there or its daemon does not answer."""
    if shutil.which("docker") is None:
        raise ContainerError("docker is not on PATH", "install it, or run trtqwen in the container yourself")
    answer = subprocess.run(["docker", "version"], capture_output=True, text=True)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ContainerError(f"docker's daemon does not answer ({reason})", "start it, or join its group")


def image_digest(image: str) -> str | None:
    """The image by digest, `name@sha256:...`, if docker has it from a registry."""
    command = ["docker", "image", "inspect", '--format={{join .RepoDigests " "}}', image]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = answer.stdout.split() if answer.returncode == 0 else []
    return next((name for name in names if "@sha256:" in name), None)


def requirements() -> list[str]:
    """What trtqwen's package needs, without its extras; no word has a space."""
    try:
        named = metadata.requires("trtqwen") or []
    except metadata.PackageNotFoundError:
        raise InputError(
            "trtqwen is not installed as a package here", "`pip install` it, so that its needs are known"
        ) from None
    return [requirement.replace(" ", "") for requirement in named if "extra ==" not in requirement]


def pins() -> list[str]:
    """The versions that are installed here of all that trtqwen needs, as `name==version`.

    A container installs these of what its image lacks, and not what a registry has meanwhile.
    """
    found: dict[str, str] = {}
    new = {"trtqwen"}
    while new:
        name = new.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system or Python
        found[name] = distribution.version
        needs = (need for need in distribution.requires or () if "extra ==" not in need)
        new |= {_project(need) for need in needs} - found.keys()
    return sorted(f"{name}=={version}" for name, version in found.items() if name != "trtqwen")


def _project(requirement: str) -> str:
    """The name of a requirement, as PEP 503 normalizes it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def _recipe_work(recipe: Recipe, arguments: Sequence[str], *, gpus: int) -> _Work:
    if recipe.engine.backend == "torch":
        return _Work(arguments, recipe.checkpoint.release, gpus=0)
    peer_to_peer = recipe.host is None or card_facts(recipe.host.card).peer_to_peer
    vllm = _vllm_release(recipe) if recipe.engine.backend == "vllm" else None
    return _Work(arguments, recipe.checkpoint.release, gpus, recipe.world_size, peer_to_peer, vllm)


def _vllm_release(recipe: Recipe) -> str:
    """The vLLM that the image has to hold: Triton's images with vLLM have both.

    Raises:
        InputError: if the recipe says that vLLM runs elsewhere.
    """
    settings = recipe.engine.vllm or VllmSettings()
    if settings.image is not None:
        raise InputError(
            f"{recipe.name}: engine.vllm.image is a container of vLLM's own, which a container cannot start",
            "serve without --in-container, or leave engine.vllm.image out to use Triton's image with vLLM",
        )
    if settings.python is not None:
        raise InputError(
            f"{recipe.name}: engine.vllm.python {settings.python} is on this machine, not in the container",
            "leave engine.vllm.python out: the image has vLLM",
        )
    return settings.release


def _plan(work: _Work, options: ContainerOptions) -> ContainerPlan:
    image, warnings = _choose_image(work, options)
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


def _choose_image(work: _Work, options: ContainerOptions) -> tuple[str, tuple[Diagnostic, ...]]:
    """The image to run, and what speaks against it.

    Raises:
        InputError: if its release or the driver does not suit, and gates are not skipped.
    """
    if work.vllm is not None:
        return _choose_vllm_image(work.vllm, options)
    try:
        known = known_image(options.image) if options.image else newest_image(work.release)
    except KeyError:
        raise InputError(f"no known image holds checkpoint.release {work.release}", "name one with --image") from None
    if known is None:
        return str(options.image), ()
    problems = []
    if known.tensorrt_llm != work.release:
        problems.append(
            Diagnostic(
                f"{known.image}: holds TensorRT-LLM {known.tensorrt_llm}, but checkpoint.release is {work.release}",
                "name another image or release",
            )
        )
    if work.gpus != 0 and options.driver:
        problem = driver_problem(options.driver, known, options.gpus)
        problems += [problem] if problem else []
    problems += [advisory] if (advisory := advisory_problem(known)) else []
    for problem in problems:
        if problem.level == "error" and not options.skip_gates:
            raise InputError(problem.what, f"{problem.hint}; --skip-gates starts all the same")
    warnings = [
        replace(problem, what=f"--skip-gates: {problem.what}", level="warning")
        if problem.level == "error"
        else problem
        for problem in problems
    ]
    return options.image or known.image, tuple(warnings)


def _choose_vllm_image(release: str, options: ContainerOptions) -> tuple[str, tuple[Diagnostic, ...]]:
    known = known_vllm_image(options.image) if options.image else vllm_image(release)
    if known is None:
        return str(options.image), ()
    warnings = []
    if known.vllm != release:
        what = f"{known.image}: holds vLLM {known.vllm}, but engine.vllm.release is {release}"
        warnings.append(Diagnostic(what, f"set engine.vllm.release to {known.vllm}", level="warning"))
    if options.driver and version(options.driver) < version(known.driver):
        what = f"{known.image}: needs driver {known.driver} or newer, and this host has {options.driver}"
        if not options.skip_gates:
            raise InputError(what, "update the driver; --skip-gates starts all the same")
        warnings.append(Diagnostic(f"--skip-gates: {what}", "update the driver", level="warning"))
    return known.image, tuple(warnings)


def _environment(work: _Work, image: str, needs: str, options: ContainerOptions) -> dict[str, str]:
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
    """Where the host keeps the virtual environment for an image, so that only the first start installs."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(f"{image} {needs}".encode()).hexdigest()[:16]
    return home / "trtqwen" / "containers" / key


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

"""The containers of `trtqwen build`, `serve`, `doctor` and `selftest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trtqwen.artifact.manifest import read_manifest
from trtqwen.containers.plan import ContainerPlan, plan_container
from trtqwen.containers.work import ContainerOptions, Work
from trtqwen.diagnostics import InputError
from trtqwen.facts.cards import card_facts
from trtqwen.facts.names import Release
from trtqwen.facts.releases import last_engine_release
from trtqwen.recipe import Recipe, VllmSettings


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
    return plan_container(replace(work, read=read, write=[engines, repository.parent]), options)


def plan_serve_container(
    recipe: Recipe,
    repository: Path,
    flags: Sequence[str],
    files: Sequence[Path],
    log: Path | None,
    options: ContainerOptions,
) -> ContainerPlan:
    """Plan the container of `trtqwen serve`. It uses the host's network, so addresses and ports are the host's.

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
    return plan_container(
        replace(work, read=[repository, Path(engine), *files], write=write, network="host"), options
    )


def plan_doctor_container(
    name: str | None,
    recipe: Recipe | None,
    flags: Sequence[str],
    read: Sequence[Path],
    options: ContainerOptions,
) -> ContainerPlan:
    """Plan the container of `trtqwen doctor`, which runs the checks inside the image, on the recipe's GPUs or on all.

    Args:
        read: directories that the flags name.

    Raises:
        InputError: as `plan_build_container`.
    """
    named, recipe_files = _recipe_argument(name) if name else (None, [])
    arguments = ["doctor", *([named] if named else []), *flags]
    links = [target for directory in read for target in _link_targets(directory)]
    if recipe is None:
        work = Work(arguments, last_engine_release(), gpus=None)
    else:
        work = _recipe_work(recipe, arguments, gpus=recipe.world_size * recipe.serve.replicas)
    return plan_container(replace(work, read=[*read, *links, *recipe_files], network="host"), options)


def plan_selftest_container(release: Release, engines: Path, json: bool, options: ContainerOptions) -> ContainerPlan:
    """The container of `trtqwen selftest`, on the first GPU.

    Raises:
        InputError: as `plan_build_container`.
    """
    engines = engines.resolve()
    arguments = ["selftest", f"--engines={engines}", *(["--json"] if json else [])]
    return plan_container(Work(arguments, release, gpus=1, write=[engines]), options)


def _recipe_work(recipe: Recipe, arguments: Sequence[str], *, gpus: int) -> Work:
    if recipe.engine.backend == "torch":
        return Work(arguments, recipe.checkpoint.release, gpus=0)
    peer_to_peer = recipe.host is None or card_facts(recipe.host.card).peer_to_peer
    vllm = _vllm_release(recipe) if recipe.engine.backend == "vllm" else None
    return Work(arguments, recipe.checkpoint.release, gpus, recipe.world_size, peer_to_peer, vllm)


def _vllm_release(recipe: Recipe) -> str:
    """Return the vLLM release that the image must contain, for Triton's images with vLLM.

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


def _recipe_argument(name: str) -> tuple[str, list[Path]]:
    """Return the recipe argument for the container, and the directories to mount for it."""
    path = Path(name)
    return (str(path.resolve()), [path]) if path.is_file() else (name, [])


def _link_targets(directory: Path) -> list[Path]:
    """Return the directories to which links in a directory point, such as the blobs of a Hugging Face cache."""
    return sorted({path.resolve().parent for path in directory.glob("*") if path.is_symlink()})

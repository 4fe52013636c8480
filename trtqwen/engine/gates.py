"""Checks before a start: whether this machine can build an engine and run an image."""

from __future__ import annotations

from collections.abc import Sequence

from trtqwen.diagnostics import Diagnostic, EngineError
from trtqwen.facts.cards import card_facts
from trtqwen.facts.names import CardName, Release
from trtqwen.facts.releases import (
    Image,
    known_release,
    last_engine_release,
    newest_image,
    newest_image_for,
    release_facts,
    version,
)
from trtqwen.system.host import Host


def driver_problem(driver: str, image: Image, gpus: Sequence[str] = ()) -> Diagnostic | None:
    """Return the problem of a driver with an image; None if the driver is as new as the image's own.

    The major version of the image's CUDA decides: a driver below it cannot run the image, one between that and the
    built one can.

    Args:
        gpus: names of the GPUs, as nvidia-smi has them.
    """
    if version(driver) >= version(image.driver):
        return None
    tag, oldest = image.image.partition(":")[2], image.oldest_driver
    if version(driver) >= version(oldest):
        return Diagnostic(
            f"driver {driver} is older than {image.driver}, which {tag} was built with; it runs the image, as CUDA "
            f"{image.cuda} needs {oldest} or newer",
            "nothing, unless kernels fail to load: then update the driver",
            "warning",
            "driver",
        )
    runs = newest_image_for(driver)
    older = f", or set checkpoint.release {runs.tensorrt_llm} for {runs.image}, the newest it runs" if runs else ""
    if runs and runs.advisories:
        older += f", which has known security holes that {runs.advisories[0].fixed_in} fixes"
    why = "GeForce cards have no forward compatibility"
    if gpus and not any("GeForce" in name for name in gpus):
        why = "forward compatibility needs the image's own entrypoint, which --in-container does not run"
    return Diagnostic(
        f"{image.image}: CUDA {image.cuda} needs NVIDIA driver {oldest} or newer, here is {driver}, and {why}",
        f"update the driver{older}",
        "error",
        "driver",
    )


def advisory_problem(image: Image) -> Diagnostic | None:
    """Return the known vulnerabilities of an image's Triton; None if there are none."""
    if not image.advisories:
        return None
    [first, *_] = image.advisories
    return Diagnostic(
        f"{image.image}: has known security holes ({', '.join(first.names)}): {first.what}",
        f"use an image from {first.fixed_in} on; until then leave Triton on loopback and its HTTP endpoint off",
        "warning",
        "advisory",
    )


def check_host(host: Host, release: Release, card: CardName | None, *, workers: int, command: str) -> None:
    """Refuse a machine on which trtllm-build would fail, or make an engine that does not run.

    Args:
        release: what the checkpoint was written for.
        card: the GPU that the engine is for; None takes the one that is here.
        workers: ranks built at a time, each on its own GPU.
        command: the call that cannot be made here.

    Raises:
        EngineError: with the actual and the required versions, and a hint.
    """
    check_software(host, release, command=command)
    gpus = host.visible_gpus
    if not gpus:
        raise EngineError(
            (
                "no GPU is visible: converting works here, but building needs the GPU that will serve "
                "(trtllm-build asks it for its kind before all else)"
            ),
            "build there, and check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    if card is None:
        return
    wanted = card_facts(card)
    for gpu in gpus[:workers]:
        if gpu.compute_capability != wanted.compute_capability:
            raise EngineError(
                (
                    f"GPU {gpu.index} is an {gpu.name} with compute capability {gpu.compute_capability}, but "
                    f"host.card {card} has {wanted.compute_capability} and an engine runs on no other"
                ),
                f"build on the {wanted.title}, or name the card that is here in the recipe",
            )


def check_release(host: Host, release: Release) -> None:
    """Refuse a TensorRT-LLM that cannot build for this release, before weights are converted for it.

    A machine without trtllm-build may still convert: the engine is then built elsewhere.

    Raises:
        EngineError: as `check_host` does.
    """
    if host.trtllm_build is not None:
        check_software(host, release, command="trtllm-build")


def check_software(host: Host, release: Release, *, command: str) -> None:
    """The part of `check_host` that needs no GPU."""
    image = newest_image(release).image
    installed = host.tensorrt_llm
    last = last_engine_release()
    if installed is not None and version(installed)[:2] > version(last)[:2]:  # pre-releases of 1.3 have lost the path
        raise EngineError(
            f"TensorRT-LLM {installed} builds no engines: upstream removed that path after {last}",
            (
                f"build and serve in {newest_image(last).image}, or serve the Hugging Face model with "
                "this release's own PyTorch backend (`trtllm-serve`)"
            ),
        )
    if host.trtllm_build is None:
        raise EngineError(
            "trtllm-build is not on this machine: the checkpoint is written, build the engine where TensorRT-LLM "
            f"{release} is installed, such as in {image}, with: {command}"
        )
    if installed is None:
        raise EngineError(
            f"{host.trtllm_build}: its Python has no TensorRT-LLM", f"repair that installation, or build in {image}"
        )
    if installed.partition("+")[0] != release:
        convert = (
            f", or set checkpoint.release: {installed} in the recipe and convert again"
            if known_release(installed)
            else ""
        )
        raise EngineError(
            (f"TensorRT-LLM {installed} is installed, but the checkpoint is for checkpoint.release {release}"),
            f"build in {image}{convert}",
        )
    pinned = release_facts(release).tensorrt
    if host.tensorrt is None or ".".join(host.tensorrt.split(".")[:2]) != pinned:
        found = f"TensorRT {host.tensorrt} is installed" if host.tensorrt else "TensorRT is not installed"
        raise EngineError(
            f"{found}, but TensorRT-LLM {release} is made for {pinned}",
            f"reinstall `tensorrt~={pinned}.0`, or build in {image}",
        )

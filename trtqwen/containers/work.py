"""The work of a container, and its options from the user and the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtqwen.facts.names import Release
from trtqwen.system.host import Host


@dataclass(frozen=True)
class ContainerOptions:
    """Options of a container from the user and the host.

    Attributes:
        image: an image by tag or digest, in place of the newest with the recipe's release.
        wheels: directory of wheels from which missing packages are installed, instead of the network.
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
class Work:
    """The requirements of the command in a container.

    Attributes:
        release: TensorRT-LLM release that the image must contain.
        gpus: number of GPUs, from the first one on; None for all.
        ranks: of one engine; more than one talk through NCCL.
        peer_to_peer: whether the cards can read each other's memory.
        vllm: release of vLLM that the image must contain instead; None for TensorRT-LLM.
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

"""Provenance of an engine: recorded at its build and compared with the machine that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from trtqwen import __version__
from trtqwen.diagnostics import Diagnostic, EngineError
from trtqwen.engine.config import read_engine_config
from trtqwen.engine.effective import SettingChange
from trtqwen.engine.flags import Flags
from trtqwen.facts.releases import images
from trtqwen.system.host import Host

PROVENANCE = "provenance.json"


class Provenance(BaseModel):
    """The record of one build; two builds of the same thing on the same machine give the same record.

    Attributes:
        compute_capability: the GPU's; the engine runs on no other.
        image, image_digest: the container image it was built in, as far as it is known.
        checkpoint: manifest key of the checkpoint.
        flags: every flag of trtllm-build but the paths.
        changes: flags that the builder changed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    tool_version: str = __version__
    tensorrt_llm: str | None
    tensorrt: str | None
    gpu: str
    compute_capability: str
    driver: str | None
    image: str | None
    image_digest: str | None = None
    checkpoint: str
    flags: dict[str, int | str | bool]
    changes: list[SettingChange]


def provenance_of(host: Host, checkpoint: str, flags: Flags, changes: list[SettingChange]) -> Provenance:
    """The record of a build on this machine.

    Args:
        checkpoint: manifest key of the checkpoint.
    """
    gpu = host.visible_gpus[0]
    return Provenance(
        tensorrt_llm=host.tensorrt_llm,
        tensorrt=host.tensorrt,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=host.driver,
        image=host.image,
        image_digest=host.image_digest,
        checkpoint=checkpoint,
        flags=dict(flags),
        changes=changes,
    )


def read_provenance(engine: Path) -> Provenance | None:
    """Read the record of an engine directory; None for torch engines and engines that were built by hand.

    Raises:
        EngineError: if there is one that cannot be read.
    """
    path = engine / PROVENANCE
    try:
        return Provenance.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # pydantic's ValidationError is one
        raise EngineError(f"{path}: is not a record of this version of trtqwen", "build the engine again") from None


def check_provenance(engine: Path, host: Host) -> list[Diagnostic]:
    """Return the problems that prevent an engine from running on this machine; empty for torch engines.

    Raises:
        InputError: if the engine's config.json is missing or broken.
        EngineError: if its provenance cannot be read.
    """
    config = read_engine_config(engine)
    if config.backend != "tensorrt_llm":
        return []
    record = read_provenance(engine)
    built_by = record.tensorrt_llm if record else config.version
    built_on = record.tensorrt if record else None
    problems = []
    if host.tensorrt_llm != built_by or (built_on is not None and host.tensorrt != built_on):
        problems.append(
            Diagnostic(
                f"{engine}: was built by {_software(built_by, built_on)}, here is "
                f"{_software(host.tensorrt_llm, host.tensorrt)}, and an engine runs with no other version",
                f"build it again here with `trtqwen build`, or serve it in {_image(record, built_by)}",
            )
        )
    if not host.visible_gpus:
        problems.append(Diagnostic(f"{engine}: needs a GPU, and none is visible", "check nvidia-smi here"))
    elif record:
        here = host.visible_gpus[0]
        if here.compute_capability != record.compute_capability:
            problems.append(
                Diagnostic(
                    f"{engine}: was built on {record.gpu} with compute capability {record.compute_capability}, here "
                    f"is {here.name} with {here.compute_capability}",
                    "build it again on this GPU with `trtqwen build`, or serve it on the other",
                )
            )
    return problems


def _software(tensorrt_llm: str | None, tensorrt: str | None) -> str:
    if tensorrt_llm is None:
        return "no TensorRT-LLM"
    return f"TensorRT-LLM {tensorrt_llm}" + (f" with TensorRT {tensorrt}" if tensorrt else "")


def _image(record: Provenance | None, tensorrt_llm: str | None) -> str:
    if record and record.image:
        return record.image
    named = (image.image for image in reversed(images()) if image.tensorrt_llm == tensorrt_llm)
    return next(named, "the image it was built in")

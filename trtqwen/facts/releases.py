"""Facts about TensorRT-LLM releases and the containers that hold them, read from `releases.json`."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from trtqwen.facts.names import Release

_FACTS = Path(__file__).with_name("releases.json")


class ReleaseFacts(BaseModel):
    """Facts about a release.

    Attributes:
        tensorrt: the TensorRT that it pins, `major.minor`; None if trtqwen builds no engines with it.
        unknown_checkpoint_keys: keys of config.json, by section, that its reader refuses.
        uneven_pipeline: whether it keeps the layers that pp_size does not divide; otherwise it drops them silently.
        rope_scalings: types of rotary scaling it computes for Qwen2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensorrt: str | None
    unknown_checkpoint_keys: dict[str, list[str]]
    uneven_pipeline: bool
    rope_scalings: list[str]


class Advisory(BaseModel):
    """Known vulnerabilities of Triton.

    Attributes:
        fixed_in: the first image without them, as `year.month` in its tag.
        names: their CVE numbers.
        what: what an attacker can do, as text after a colon.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed_in: str
    names: tuple[str, ...]
    what: str


class Image(BaseModel):
    """A container image with Triton, TensorRT-LLM and its C++ backend.

    Attributes:
        driver: the driver that it was built with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    tensorrt_llm: str
    tensorrt: str
    cuda: str
    driver: str

    @property
    def oldest_driver(self) -> str:
        """The oldest driver that runs it, on GeForce and data-center cards alike: CUDA's major version decides."""
        oldest: str = _facts()["cuda_drivers"][self.cuda.partition(".")[0]]
        return oldest

    @property
    def advisories(self) -> tuple[Advisory, ...]:
        """Known vulnerabilities of the image."""
        tag = version(self.image.rpartition(":")[2])
        known = (Advisory.model_validate(content) for content in _facts()["advisories"])
        return tuple(advisory for advisory in known if tag < version(advisory.fixed_in))


def version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: 1.3.0rc15 is (1, 3, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def known_release(installed: str | None) -> Release | None:
    """The release that an installed version is, local parts such as `+cu130` aside; None if it is not known."""
    base = (installed or "").partition("+")[0]
    return next((release for release in get_args(Release) if release == base), None)


def release_facts(release: Release) -> ReleaseFacts:
    """The facts of one release."""
    return ReleaseFacts.model_validate(_facts()["releases"][release])


@cache
def images() -> tuple[Image, ...]:
    """The known images, oldest first."""
    return tuple(Image.model_validate(image) for image in _facts()["images"])


def newest_image(release: Release) -> Image:
    """The newest image that holds a release.

    Raises:
        KeyError: for a release without images (0.17.0).
    """
    for image in reversed(images()):
        if image.tensorrt_llm == release:
            return image
    raise KeyError(release)


def newest_image_for(driver: str) -> Image | None:
    """The newest image that a driver runs; None if it is too old for all."""
    return next((image for image in reversed(images()) if version(driver) >= version(image.oldest_driver)), None)


def known_image(name: str | None) -> Image | None:
    """The known image of this name."""
    return next((image for image in images() if image.image == name), None)


def last_engine_release() -> Release:
    """The last release that builds engines; upstream removed the path after it."""
    release: Release = _facts()["last_engine_release"]
    return release


def image_size_gb() -> float:
    """Compressed size of an image, in GB."""
    size: float = _facts()["image_size_gb"]
    return size


@cache
def _facts() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_FACTS.read_text(encoding="utf-8"))
    return content

"""Facts about vLLM releases, read from `vllm.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from trtqwen.diagnostics import EngineError
from trtqwen.facts.names import VllmRelease
from trtqwen.facts.releases import version

_FACTS = Path(__file__).with_name("vllm.json")


@dataclass(frozen=True)
class VllmFacts:
    """Options and fields of a release's API server.

    Attributes:
        release: the known release; newer ones are read as the newest known.
        flags: its options, without dashes.
        request_fields: of `/v1/completions`.
    """

    release: VllmRelease
    flags: frozenset[str]
    request_fields: frozenset[str]

    def near(self, flag: str) -> str | None:
        """Return the known option that is most similar to a misspelled one."""
        match = get_close_matches(flag, self.flags, n=1)
        return match[0] if match else None


@cache
def vllm_facts(release: str) -> VllmFacts:
    """The facts of the newest known release that is not newer than `release`, or of the oldest known one."""
    content = _content()
    known: list[VllmRelease] = sorted(content["releases"], key=version)
    older = [name for name in known if version(name) <= version(release)]
    name = older[-1] if older else known[0]
    more = content["releases"][name]
    return VllmFacts(
        name,
        frozenset([*content["flags"], *more["more_flags"]]),
        frozenset([*content["request_fields"], *more["more_request_fields"]]),
    )


def check_release(release: str) -> None:
    """Raise an EngineError if a vLLM is older than the oldest known one; newer ones are read as the newest."""
    oldest = min(_content()["releases"], key=version)
    if version(release) < version(oldest):
        raise EngineError(
            f"vLLM {release} is older than {oldest}, the oldest that is served", f"install vLLM {oldest} or newer"
        )


@dataclass(frozen=True)
class VllmImage:
    """An image of Triton with vLLM.

    Attributes:
        vllm: its release.
        driver: the oldest NVIDIA driver that runs it.
    """

    image: str
    vllm: str
    driver: str


def vllm_image(release: str) -> VllmImage:
    """Triton's newest image whose vLLM is not newer than `release`, or its oldest known one."""
    images = _images()
    fitting = [image for image in images if version(image.vllm) <= version(release)]
    return fitting[-1] if fitting else images[0]


def known_vllm_image(name: str) -> VllmImage | None:
    """The image of this name; None if it is not known."""
    return next((image for image in _images() if image.image == name), None)


def _images() -> list[VllmImage]:
    return [VllmImage(**image) for image in _content()["images"]]


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_FACTS.read_text(encoding="utf-8"))
    return content

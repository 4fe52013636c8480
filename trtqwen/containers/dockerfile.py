"""An image with trtqwen and its dependencies on NVIDIA's image, which is pinned by digest."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trtqwen import __version__
from trtqwen.artifact.directory import finished_directory
from trtqwen.containers.docker import check_docker, image_digest
from trtqwen.containers.installed import HOME, PACKAGE, START_INSIDE, pins, requirements
from trtqwen.diagnostics import ContainerError, InputError
from trtqwen.facts.names import Release
from trtqwen.facts.releases import newest_image
from trtqwen.recipe import BUNDLED, CHECKOUT
from trtqwen.system.host import DIGEST_VARIABLE, IMAGE_VARIABLE

_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


@dataclass(frozen=True)
class ImagePlan:
    """An image to build.

    Attributes:
        base: NVIDIA's image, by tag.
        tag: name of the image that is built.
        context: directory for the Dockerfile and what it copies.
    """

    base: str
    tag: str
    context: Path

    @property
    def commands(self) -> list[list[str]]:
        """Return the commands in order. The first one pulls the base, so that its digest is known."""
        return [["docker", "pull", self.base], ["docker", "build", f"--tag={self.tag}", str(self.context)]]

    def dockerfile(self, digest: str | None) -> str:
        """The Dockerfile.

        Args:
            digest: the base by digest; its tag where None.
        """
        return f"""\
# Written by trtqwen {__version__}.
FROM {digest or self.base}
ENV {IMAGE_VARIABLE}="{self.base}" {DIGEST_VARIABLE}="{digest or ""}" PYTHONPATH="{HOME}" PIP_CONSTRAINT=""
ENV TRTQWEN_REQUIRES="{" ".join(requirements())}" TRTQWEN_PINS="{" ".join(pins())}" PYTHONSAFEPATH="1"
COPY trtqwen {HOME}/trtqwen
COPY recipes {HOME}/recipes
RUN TRTQWEN_CACHE=/opt/trtqwen-venv bash {START_INSIDE} --version && chmod -R a+rX /opt/trtqwen-venv {HOME}
ENTRYPOINT ["bash", "{START_INSIDE}"]
"""


def plan_image(release: Release, tag: str | None, context: Path, base: str | None = None) -> ImagePlan:
    """The image for a release.

    Args:
        base: in place of the newest image with the release.

    Raises:
        InputError: if no image with the release is known.
    """
    try:
        base = base or newest_image(release).image
    except KeyError:
        raise InputError(f"no known image holds TensorRT-LLM {release}", "name one with --base") from None
    return ImagePlan(base, tag or f"trtqwen:{release}", context)


def write_context(plan: ImagePlan, digest: str | None, *, force: bool = False) -> None:
    """Write the Dockerfile with trtqwen and its recipes next to it.

    Raises:
        OutputError: if the directory exists and `force` is not set.
    """
    recipes = CHECKOUT if CHECKOUT.is_dir() else BUNDLED
    with finished_directory(plan.context, force=force) as directory:
        (directory / "Dockerfile").write_text(plan.dockerfile(digest), encoding="utf-8")
        shutil.copytree(PACKAGE, directory / "trtqwen", ignore=_IGNORED)
        shutil.copytree(recipes, directory / "recipes", ignore=_IGNORED)


def build_image(plan: ImagePlan, *, force: bool = False) -> str | None:
    """Pull the base, write the context and build; Docker's output is shown.

    Returns:
        The base by digest.

    Raises:
        ContainerError: if docker does not answer, or one of its commands fails.
        OutputError: as `write_context`.
    """
    check_docker()
    pull, build = plan.commands
    _run(pull)
    digest = image_digest(plan.base)
    write_context(plan, digest, force=force)
    _run(build)
    return digest


def _run(command: list[str]) -> None:
    code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if code:
        raise ContainerError(
            f"`{' '.join(command)}` failed with exit code {code}",
            "read docker's message above, or `trtqwen explain` it",
        )

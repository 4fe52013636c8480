"""The image that compose and Kubernetes run: trtqwen in an environment that sees the base image's packages."""

from __future__ import annotations

from dataclasses import dataclass

from trtqwen import __version__
from trtqwen.diagnostics import InputError
from trtqwen.facts.releases import newest_image
from trtqwen.recipe import Recipe
from trtqwen.system.host import IMAGE_VARIABLE

_PYTHON_IMAGE = "python:3.12-bookworm"  # a shared libpython, which the tritonserver of nvidia-pytriton needs
_NVIDIA = """\
# syntax=docker/dockerfile:1
FROM {base}
ARG TRTQWEN="trtqwen=={version}"
# The environment sees the packages of the image's own python3, which may be in a virtual environment itself.
RUN <<END
set -e
python3 -m venv --without-pip /opt/trtqwen-venv
site=$(/opt/trtqwen-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python3 -c '
import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({{path!r}})")
' > "$site/image.pth"
PIP_CONSTRAINT= python3 -m pip --python /opt/trtqwen-venv/bin/python install --no-cache-dir "$TRTQWEN"
END
ENV PATH=/opt/trtqwen-venv/bin:$PATH LC_ALL=C.UTF-8 {variable}={base}
ENTRYPOINT ["trtqwen"]
"""
_PLAIN = """\
FROM {base}
ARG TRTQWEN="trtqwen[torch,triton]=={version}"
RUN pip install --no-cache-dir "$TRTQWEN"
ENV LC_ALL=C.UTF-8
ENTRYPOINT ["trtqwen"]
"""


@dataclass(frozen=True)
class ServingImage:
    """An image and how it is built.

    Attributes:
        name: the tag.
        base: the image that it is built from.
        dockerfile: its build.
    """

    name: str
    base: str
    dockerfile: str


def serving_image(recipe: Recipe, name: str | None = None) -> ServingImage:
    """The image of a recipe: NVIDIA's for its TensorRT-LLM release, Python's for the embedded engine on CPUs.

    Args:
        name: a tag in place of `trtqwen:VERSION-RELEASE`.

    Raises:
        InputError: if no known image holds the recipe's release, or the backend has no image.
    """
    backend, release = recipe.engine.backend, recipe.checkpoint.release
    if backend == "torch":
        base = _PYTHON_IMAGE
        return ServingImage(
            name or f"trtqwen:{__version__}-torch", base, _PLAIN.format(base=base, version=__version__)
        )
    if backend != "tensorrt_llm":
        raise InputError(
            f"recipe {recipe.name}: deployments of engine.backend {backend} are not known",
            "take a recipe of backend tensorrt_llm or torch",
        )
    try:
        base = newest_image(release).image
    except KeyError:
        raise InputError(
            f"recipe {recipe.name}: no known image holds checkpoint.release {release}", "set a newer release"
        ) from None
    text = _NVIDIA.format(base=base, version=__version__, variable=IMAGE_VARIABLE)
    return ServingImage(name or f"trtqwen:{__version__}-{release}", base, text)

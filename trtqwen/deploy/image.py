"""The image that compose and Kubernetes run: trtqwen in an environment that sees the base image's packages."""

from __future__ import annotations

from dataclasses import dataclass

from trtqwen import __version__
from trtqwen.diagnostics import InputError
from trtqwen.facts.releases import newest_image
from trtqwen.facts.vllm import vllm_image
from trtqwen.recipe import Recipe, VllmSettings
from trtqwen.system.host import IMAGE_VARIABLE
from trtqwen.vllm.server import PYTHON_VARIABLE

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
ENV PATH=/opt/trtqwen-venv/bin:$PATH LC_ALL=C.UTF-8 {variable}={base}{more}
ENTRYPOINT ["trtqwen"]
"""
# vLLM runs in a process of its own, with the interpreter of the image that it is installed for.
_VLLM_PYTHON = f" {PYTHON_VARIABLE}=/usr/bin/python3"
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
    """The image of a recipe.

    It is NVIDIA's image of the TensorRT-LLM release, which also holds the LLM API; Triton's image with vLLM; or
    Python's for the embedded engine.

    Args:
        name: a tag in place of `trtqwen:VERSION-RELEASE`.

    Raises:
        InputError: if no known image holds the recipe's release, or vLLM runs elsewhere.
    """
    backend, release = recipe.engine.backend, recipe.checkpoint.release
    if backend == "torch":
        base = _PYTHON_IMAGE
        return ServingImage(
            name or f"trtqwen:{__version__}-torch", base, _PLAIN.format(base=base, version=__version__)
        )
    if backend == "vllm":
        settings = recipe.engine.vllm or VllmSettings()
        for field in ("python", "image"):
            if getattr(settings, field) is not None:
                raise InputError(
                    f"recipe {recipe.name}: engine.vllm.{field} names a vLLM outside of the deployment's image",
                    f"remove engine.vllm.{field}; the image has a vLLM of its own",
                )
        base = vllm_image(settings.release).image
        text = _NVIDIA.format(base=base, version=__version__, variable=IMAGE_VARIABLE, more=_VLLM_PYTHON)
        return ServingImage(name or f"trtqwen:{__version__}-vllm-{settings.release}", base, text)
    try:
        base = newest_image(release).image
    except KeyError:
        raise InputError(
            f"recipe {recipe.name}: no known image holds checkpoint.release {release}", "set a newer release"
        ) from None
    text = _NVIDIA.format(base=base, version=__version__, variable=IMAGE_VARIABLE, more="")
    return ServingImage(name or f"trtqwen:{__version__}-{release}", base, text)


def gpus_of(recipe: Recipe) -> int:
    """GPUs that one replica takes; 0 for the embedded engine on a CPU, and for a vLLM that serves elsewhere."""
    if recipe.engine.backend == "torch":
        on_card = recipe.serve.device == "cuda" or (recipe.serve.device == "auto" and recipe.host is not None)
        return recipe.world_size if on_card else 0
    elsewhere = recipe.engine.vllm is not None and recipe.engine.vllm.address is not None
    return 0 if elsewhere else recipe.world_size

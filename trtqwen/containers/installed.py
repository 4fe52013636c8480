"""trtqwen inside a container: mount point, start script, and required packages."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from trtqwen.diagnostics import InputError

PACKAGE = Path(__file__).parents[1]
HOME = Path("/opt/trtqwen")  # in the container
START = Path(__file__).with_name("container_start.sh")
START_INSIDE = f"{HOME}/{START.relative_to(PACKAGE.parent)}"


def requirements() -> list[str]:
    """Return the requirements of trtqwen without its extras, each without spaces."""
    try:
        named = metadata.requires("trtqwen") or []
    except metadata.PackageNotFoundError:
        raise InputError(
            "trtqwen is not installed as a package here", "`pip install` it, so that its dependencies are known"
        ) from None
    return [requirement.replace(" ", "") for requirement in named if "extra ==" not in requirement]


def pins() -> list[str]:
    """Return `name==version` for every dependency of trtqwen that is installed here.

    A container installs these versions of packages that its image lacks, not the registry's newest ones.
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

"""Find this machine's tritonserver: a container's own, or the one in the package nvidia-pytriton."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from trtqwen.diagnostics import ServerError

_CONTAINER = "/opt/tritonserver/bin"  # where NVIDIA's images have it
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A tritonserver on this machine.

    Attributes:
        binary: the program.
        home: of the one inside nvidia-pytriton: the directory with its backends; None for an ordinary one.
        libraries: directories that the program needs on LD_LIBRARY_PATH.
    """

    binary: Path
    home: Path | None = None
    libraries: tuple[Path, ...] = ()


def find_tritonserver() -> Installation:
    """The tritonserver on PATH, else a container's, else the one inside the package nvidia-pytriton.

    Raises:
        ServerError: if there is none, or it has no part for this Python.
    """
    if found := shutil.which("tritonserver") or shutil.which("tritonserver", path=_CONTAINER):
        return Installation(Path(found))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "no tritonserver on this machine", "run in NVIDIA's Triton container or `pip install 'trtqwen[triton]'`"
        )
    home = Path(spec.origin).parent / "tritonserver"
    if not _stub(home).is_file():
        raise ServerError(f"{home}: has no python backend for Python {_python_version()}", "use Python 3.10 to 3.12")
    library_directory = sysconfig.get_config_var("LIBDIR")
    library = Path(library_directory, sysconfig.get_config_var("INSTSONAME") or "")
    if not library.is_file() or ".so" not in library.name:
        raise ServerError(
            f"{sys.executable}: has no shared libpython, which Triton's python backend loads",
            "use a Python that was built with --enable-shared",
        )
    return Installation(
        binary=home / "bin" / "tritonserver",
        home=home,
        libraries=(home.parents[1] / "nvidia_pytriton.libs", library.parent),
    )


def link_backends(home: Path, workspace: Path) -> Path:
    """Make a directory of links to the backends: the python backend needs the stub of this Python next to it."""
    backends = workspace / "backends"
    python = backends / "python"
    python.mkdir(parents=True)
    for file in (home / "backends" / "python").iterdir():
        if file.is_file():
            (python / file.name).symlink_to(file)
    (python / _STUB).symlink_to(_stub(home))
    return backends


def _stub(home: Path) -> Path:
    return home / "python_backend_stubs" / _python_version() / _STUB


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"

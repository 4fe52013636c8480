"""The environment of a tritonserver and of its python models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trtqwen.triton.installation import Installation

# A launcher around us left these; they would make our ranks join its job.
FOREIGN_LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "SLURM_")


def server_environment(installation: Installation) -> dict[str, str]:
    """Return the server's environment, made from this process's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_LAUNCHERS)}
    # A module in the working directory is never imported, and nothing is written into the repository.
    environment |= {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["LC_ALL"] = "C.UTF-8"  # python models read and write UTF-8 regardless of the terminal
    _prepend(environment, "PATH", Path(sys.executable).parent)
    _prepend(environment, "PYTHONPATH", Path(__file__).parents[2])  # the models import this very trtqwen
    for directory in reversed(installation.libraries):
        _prepend(environment, "LD_LIBRARY_PATH", directory)
    return environment


def _prepend(environment: dict[str, str], variable: str, directory: Path) -> None:
    rest = environment.get(variable)
    environment[variable] = f"{directory}{os.pathsep}{rest}" if rest else str(directory)

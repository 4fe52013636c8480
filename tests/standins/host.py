"""A machine with TensorRT-LLM, as far as trtqwen sees it: programs on PATH and packages' metadata, nothing more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ADA = ("NVIDIA GeForce RTX 4090 D", "8.9")
PROGRAM = Path(__file__).with_name("trtllm_build.py")


def install(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tensorrt_llm: str | None = "1.2.1",
    tensorrt: str | None = "10.14.1.48",
    gpus: tuple[tuple[str, str], ...] = (ADA,) * 4,
    program: bool = True,
) -> None:
    """Put the stand-ins under `home` and in front of PATH and the import path."""
    binaries, packages = home / "bin", home / "packages"
    binaries.mkdir(parents=True)
    for name, version in (("tensorrt_llm", tensorrt_llm), ("tensorrt", tensorrt)):
        if version is not None:
            info = packages / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if program:
        _script(binaries / "trtllm-build", f'#!/bin/sh\nexec {sys.executable} -S {PROGRAM} "$@"\n')
    if gpus:
        rows = "".join(f"{index}, {name}, {sm}, 24564, 300, 590.44.01\n" for index, (name, sm) in enumerate(gpus))
        _script(binaries / "nvidia-smi", f"#!/bin/sh\nprintf '%s' '{rows}'\n")
    monkeypatch.setenv("PATH", str(binaries), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=":")
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)

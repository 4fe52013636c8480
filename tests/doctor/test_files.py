"""Files that are not as they were written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.doctor.conftest import check
from trtqwen.doctor.subject import Subject, completed
from trtqwen.recipe import ServeRecipe
from trtqwen.system.host import Host
from trtqwen.triton.repository import write_repository


@pytest.mark.parametrize("name", ["engine/rank0.safetensors", "engine/config.json", "repo/tensorrt_llm/config.pbtxt"])
def test_a_changed_bit_is_found(bundled_engine: Callable[..., Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(bundled_engine(), tmp_path / "engine")
    write_repository(tmp_path / "engine", ServeRecipe(), tmp_path / "repo")
    subject = completed(Subject(Host(), repository=tmp_path / "repo"))
    assert check("D25", subject).verdict == "ok"
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    result = check("D25", subject)
    assert result.verdict == "fail"
    assert Path(name).name in result.evidence
    assert check("D25", Subject(Host())).verdict == "skip"

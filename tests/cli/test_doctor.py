"""`trtqwen doctor` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_cli import refused, trtqwen
from tests.doctor.test_run import IDS
from trtqwen.demo import MODEL


def test_a_host_alone() -> None:
    result = trtqwen("doctor", "--json")
    printed = json.loads(result.stdout)
    assert result.returncode == (1 if printed["counts"]["fail"] else 0)
    assert [check["id"] for check in printed["checks"]] == IDS
    for check in printed["checks"]:
        assert set(check) == {"id", "level", "title", "verdict", "evidence", "hint"}
    assert sum(printed["counts"].values()) == len(IDS)


def test_a_built_recipe_passes_and_a_broken_repository_fails(tmp_path: Path) -> None:
    assert trtqwen("build", "qwen2-tiny-cpu", "--model", MODEL, cwd=tmp_path).returncode == 0
    well = trtqwen("doctor", "qwen2-tiny-cpu", "--model", MODEL, cwd=tmp_path)
    assert well.returncode == 0, well.stdout
    assert "\n0 failed" in well.stdout
    for part in ("D22", "D28", "give --url"):
        assert part in well.stdout
    config = tmp_path / "triton_repo/qwen2-tiny-cpu/tensorrt_llm/config.pbtxt"
    config.write_text(config.read_text("utf-8").replace("max_batch_size: 16", "max_batch_size: ${size}"))
    broken = trtqwen("doctor", "--repo", config.parents[1], cwd=tmp_path)
    assert broken.returncode == 1
    lines = broken.stdout.replace("│", " ").split()
    assert "fail" in lines
    assert "${size}," in lines
    assert "->" in lines
    assert broken.stderr == ""


def test_bad_usage() -> None:
    refused(trtqwen("doctor", "--model", "/nowhere"), "/nowhere: no such directory")

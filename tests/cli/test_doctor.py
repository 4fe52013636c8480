"""`trtqwen doctor` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import refused
from tests.command_line import trtqwen
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


DOCKER = f"""#!/bin/bash
case $1 in
  version) exit 0;;
  info) [[ $2 == *Root* ]] && echo /var/lib/docker || echo '{{"nvidia":{{}}}}'; exit 0;;
  image) echo sha256:1; exit 0;;
esac
if [ -n "$BROKEN" ]; then
  echo "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.1" >&2
  exit 125
fi
while [[ $1 != *container_start.sh ]]; do shift; done
shift
TRTQWEN_IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 exec {sys.executable} -m trtqwen "$@"
"""
NVIDIA_SMI = """#!/bin/bash
for index in 0 1 2 3; do
  case $1 in
    *compute_cap*) echo "$index, NVIDIA GeForce RTX 4090 D, 8.9, 24564, 14, 590.48.01";;
    *pcie*) echo "$index, 16, 16, 4";;
    *power*) echo "$index, 425.00, 425.00";;
    *persistence*) echo "$index, Enabled";;
  esac
done
"""


@pytest.fixture
def healthy_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four RTX 4090D with docker, where TensorRT-LLM is only in the image; /proc/self/limits is this machine's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("docker", DOCKER), ("nvidia-smi", NVIDIA_SMI)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    return tmp_path


@pytest.mark.parametrize("recipe", ["qwen2.5-7b-bf16-tp1x4-4090d", "qwen2.5-7b-bf16-tp4-4090d"])
def test_a_healthy_host_passes_before_anything_is_built(healthy_host: Path, recipe: str) -> None:
    """README's sequence: what the container sets is not asked of the host."""
    result = trtqwen("doctor", recipe, cwd=healthy_host)
    assert result.returncode == 0, result.stdout
    assert "\n0 failed" in result.stdout
    for check in ("D05", "D08", "D35", "D36", "D37", "D38", "D39"):
        assert f"ok   {check} " in result.stdout, result.stdout


def test_the_checks_run_inside_the_container(healthy_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "qwen2.5-7b-bf16-tp1x4-4090d"
    planned = trtqwen("doctor", recipe, "--in-container", "--dry-run", cwd=healthy_host)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("docker run \\\n")
    assert f"doctor {recipe} --json" in planned.stdout
    result = trtqwen("doctor", recipe, "--in-container", "--json", cwd=healthy_host)
    checks = {check["id"]: check for check in json.loads(result.stdout)["checks"]}
    assert [checks[name]["verdict"] for name in ("D05", "D35", "D36")] == ["ok"] * 3
    assert "26.07-trtllm-python-py3" in checks["D05"]["evidence"]
    assert sorted(checks) == IDS
    monkeypatch.setenv("BROKEN", "1")
    broken = trtqwen("doctor", recipe, "--in-container", cwd=healthy_host)
    assert broken.returncode == 1
    assert "the image asks for a newer driver than the host has" in broken.stderr
    refused(trtqwen("doctor", "--dry-run", cwd=healthy_host), "--dry-run has no effect without --in-container")


def test_no_hint_is_cut_off(healthy_host: Path) -> None:
    smi = healthy_host / "bin" / "nvidia-smi"
    smi.write_text(NVIDIA_SMI.replace("590.48.01", "575.57.08"))
    result = trtqwen("doctor", "qwen2.5-7b-bf16-tp4-4090d", cwd=healthy_host)
    assert result.returncode == 1
    remedy = (
        "set checkpoint.release 1.0.0 for nvcr.io/nvidia/tritonserver:25.10-trtllm-python-py3, the newest it runs"
    )
    assert remedy in result.stdout

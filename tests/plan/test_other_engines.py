"""Plans of recipes for vLLM and the LLM API: the mapped settings, and doctor's look at what is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.standins import vllm_server
from trtqwen.doctor.recipe import BuildFlags
from trtqwen.doctor.subject import Subject
from trtqwen.plan.plan import plan_recipe
from trtqwen.recipe import Recipe
from trtqwen.system.host import Host


def recipe(backend: str, **engine: Any) -> Recipe:
    content = {
        "name": "r",
        "description": "d",
        "model": "qwen2.5-7b",
        "host": {"card": "rtx-4090d", "gpus": 2},
        "checkpoint": {"dtype": "bfloat16", "tp_size": 2},
        "engine": {"backend": backend, "max_seq_len": 8192, **engine},
    }
    return Recipe.model_validate(content)


def test_vllms_command_line_is_in_the_plan() -> None:
    plan = plan_recipe(recipe("vllm", vllm={"arguments": {"enforce-eager": True}}))
    assert plan.fits
    words = set(plan.command)
    assert {"--tensor-parallel-size=2", "--max-model-len=8192", "--dtype=bfloat16", "--enforce-eager"} <= words
    [share] = [word for word in plan.command if word.startswith("--gpu-memory-utilization=")]
    # 0.9 of what 7.6 GiB of weights leave on 24 GiB, and the weights.
    assert 0.9 < float(share.partition("=")[2]) < 0.97
    assert plan.kv_tokens > 100_000


def test_the_llm_apis_arguments_are_in_the_plan() -> None:
    plan = plan_recipe(recipe("llmapi"))
    assert 'allreduce_strategy="NCCL"' in plan.command  # GeForce cards cannot read each other's memory
    assert "tensor_parallel_size=2" in plan.command


@pytest.mark.parametrize(
    ("version", "verdict", "text"),
    [("0.32.0", "ok", "vLLM 0.32.0"), ("0.24.0", "fail", "vLLM 0.24.0 has no option --log-level")],
)
def test_doctor_checks_options_against_the_installed_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, verdict: str, text: str
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", version)
    monkeypatch.setenv("TRTQWEN_VLLM_PYTHON", str(vllm_server.write_python(tmp_path / "python")))
    checked = recipe("vllm", vllm={"arguments": {"log-level": "info"}})
    result = BuildFlags().run(Subject(host=Host(), recipe=checked))
    assert result.verdict == verdict
    assert text in str(result)


def test_doctor_says_when_there_is_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTQWEN_VLLM_PYTHON", sys.executable)
    result = BuildFlags().run(Subject(host=Host(), recipe=recipe("vllm")))
    assert "has no vLLM" in str(result)


def test_doctor_checks_arguments_against_the_installed_llm_api() -> None:
    newer = recipe("llmapi", llmapi={"release": "1.3.0", "arguments": {"orchestrator_type": "ray"}})
    result = BuildFlags().run(Subject(host=Host(tensorrt_llm="1.2.1"), recipe=newer))
    assert "has no argument 'orchestrator_type'" in str(result)

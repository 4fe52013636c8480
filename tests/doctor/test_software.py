"""What is installed: each case is a host that users have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.containers.test_image import DATA_CENTER, DRIVERS, GEFORCE
from tests.doctor.conftest import FOUR, IN_IMAGE, check
from trtqwen.doctor.subject import Subject, System
from trtqwen.recipe import load_recipe
from trtqwen.system.host import Gpu, Host

Machine = Callable[..., System]
A100 = (Gpu(0, "NVIDIA A100-SXM4-80GB", "8.0", 81920, 0),)
TRITON = {"opt/tritonserver/bin/tritonserver": ""}
LIBRARY = {"opt/tritonserver/backends/tensorrtllm/libtriton_tensorrtllm.so": ""}


@pytest.mark.parametrize(
    ("name", "host", "verdict", "says"),
    [
        (
            "D02",
            Host(),
            "skip",
            "no TensorRT-LLM here; engines are built in nvcr.io/nvidia/tritonserver:26.07-trtllm",
        ),
        ("D02", IN_IMAGE, "ok", "TensorRT-LLM 1.2.1"),
        ("D02", replace(IN_IMAGE, tensorrt_llm="1.3.0rc22", trtllm_build=None), "fail", "removed the engine path"),
        ("D02", replace(IN_IMAGE, tensorrt_llm="1.4.0rc1"), "fail", "use nvcr.io/nvidia/tritonserver:26.07-trtllm"),
        ("D02", replace(IN_IMAGE, trtllm_build=None), "fail", "trtllm-build is not on PATH"),
        ("D03", Host(), "skip", "no TensorRT here"),
        ("D03", IN_IMAGE, "ok", "10.14.1.48"),
        ("D03", replace(IN_IMAGE, tensorrt="11.0.0.1"), "fail", "need TensorRT 10"),
        ("D03", replace(IN_IMAGE, tensorrt="10.15.1.29"), "fail", "which pins 10.14"),
        ("D05", Host(), "skip", "no NVIDIA driver here"),
        ("D05", IN_IMAGE, "ok", "driver 590.44.01"),
        ("D05", replace(IN_IMAGE, driver="575.57.08"), "fail", "GeForce cards have no forward compatibility"),
        (
            "D05",
            replace(IN_IMAGE, driver="575.57.08"),
            "fail",
            "release 1.0.0 for nvcr.io/nvidia/tritonserver:25.10-",
        ),
        ("D05", replace(IN_IMAGE, driver="575.57.08", gpus=A100), "fail", "needs the image's own entrypoint"),
        ("D05", replace(IN_IMAGE, driver="580.95.05"), "warn", "runs the image, as CUDA 13.1.0 needs 580 or newer"),
        ("D05", replace(IN_IMAGE, driver="580.95.05", gpus=A100), "warn", "runs the image"),
        ("D05", replace(IN_IMAGE, driver="535.104"), "fail", "needs NVIDIA driver 580 or newer, here is 535.104"),
    ],
)
def test_versions(machine: Machine, name: str, host: Host, verdict: str, says: str) -> None:
    result = check(name, Subject(host, machine()))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


@pytest.mark.parametrize(
    ("host", "verdict", "says"),
    [
        (Host(), "skip", "no image of NVIDIA runs here"),
        (IN_IMAGE, "ok", "none is known of 26.07-trtllm-python-py3"),
        (
            replace(IN_IMAGE, image="nvcr.io/nvidia/tritonserver:25.07-trtllm-python-py3"),
            "ok",
            "none is known of 25.07",
        ),
        (replace(IN_IMAGE, image="nvcr.io/nvidia/tritonserver:25.05-trtllm-python-py3"), "warn", "CVE-2025-23319"),
        (replace(IN_IMAGE, image="nvcr.io/nvidia/tritonserver:25.05-trtllm-python-py3"), "warn", "from 25.07 on"),
        (Host(gpus=FOUR), "ok", "none is known of"),  # what this host would run
    ],
)
def test_an_image_with_known_holes_is_told(machine: Machine, host: Host, verdict: str, says: str) -> None:
    result = check("D41", Subject(host, machine()))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


def test_holes_are_those_of_the_recipes_image(machine: Machine) -> None:
    recipe = load_recipe("qwen2.5-7b-fp16-tp4-4090d")
    checkpoint = recipe.checkpoint.model_copy(update={"release": "0.19.0"})
    older = recipe.model_copy(update={"checkpoint": checkpoint})
    result = check("D41", Subject(Host(gpus=FOUR), machine(), older))
    assert (result.verdict, "CVE-2025-23319" in result.evidence) == ("warn", True)


def test_a_triton_without_the_backend_is_told(machine: Machine) -> None:
    result = check("D02", Subject(IN_IMAGE, machine(TRITON)))
    assert (result.verdict, "libtriton_tensorrtllm.so" in result.evidence) == ("fail", True)
    assert "-trtllm-python-py3" in result.hint


def test_a_triton_with_the_backend_is_fine(machine: Machine) -> None:
    assert check("D02", Subject(IN_IMAGE, machine(TRITON | LIBRARY))).verdict == "ok"


@pytest.mark.parametrize(("source", "verdict"), [("class BuildConfig:\n", "ok"), ("class Nothing:\n", "fail")])
def test_build_config_is_looked_for_in_the_file(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, verdict: str
) -> None:
    package = tmp_path / "site" / "tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "builder.py").write_text(source)
    monkeypatch.syspath_prepend(str(package.parent))
    assert check("D02", Subject(IN_IMAGE, machine())).verdict == verdict
    assert "tensorrt_llm" not in sys.modules


@pytest.mark.parametrize("gpu", [GEFORCE, DATA_CENTER])
@pytest.mark.parametrize(("release", "driver", "verdict"), DRIVERS)
def test_doctor_says_of_a_driver_what_build_says(
    release: str, driver: str, verdict: str | None, gpu: str, machine: Machine
) -> None:
    recipe = load_recipe("qwen2.5-7b-fp16-tp4-4090d")
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"release": release})})
    host = Host(driver=driver, gpus=tuple(Gpu(index, gpu, "8.9", 24564, 0) for index in range(4)))
    expected = {"error": "fail", "warning": "warn", None: "ok"}[verdict]
    assert check("D05", Subject(host, machine(), recipe)).verdict == expected


def test_the_driver_is_held_against_the_recipes_release(machine: Machine) -> None:
    recipe = load_recipe("qwen2.5-7b-fp16-tp4-4090d")
    older = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"release": "1.0.0"})})
    host = Host(driver="575.57.08", gpus=FOUR)
    assert check("D05", Subject(host, machine(), recipe)).verdict == "fail"
    assert check("D05", Subject(host, System(), older)).verdict == "ok"


@pytest.mark.parametrize(
    ("host", "environ", "says"),
    [
        (Host(), {}, ""),
        (Host(), {"NCCL_DEBUG": "INFO"}, ""),
        (Host(), {"SLURM_JOB_ID": "7", "PMIX_RANK": "0"}, "PMIX_RANK, SLURM_JOB_ID"),
        (Host(), {"OMPI_COMM_WORLD_SIZE": "4"}, "env -u OMPI_COMM_WORLD_SIZE"),
        (Host(), {"NCCL_SHM_DISABLE": "1"}, "unset NCCL_SHM_DISABLE"),
        (IN_IMAGE, {}, ""),  # serve and containers set NCCL_P2P_DISABLE themselves
        (IN_IMAGE, {"NCCL_P2P_DISABLE": "0"}, "unset NCCL_P2P_DISABLE"),
        (IN_IMAGE, {"NCCL_P2P_DISABLE": "1"}, ""),
        (IN_IMAGE, {"NCCL_P2P_LEVEL": "LOC"}, ""),
        (replace(IN_IMAGE, gpus=FOUR[:1]), {}, ""),
        (IN_IMAGE, {"NCCL_P2P_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, "shows 2 GPUs, 4 ranks"),
        (IN_IMAGE, {"NCCL_P2P_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}, "shows 0 GPUs"),
        (IN_IMAGE, {"NCCL_P2P_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ""),
    ],
)
def test_environment(machine: Machine, host: Host, environ: dict[str, str], says: str) -> None:
    result = check("D08", Subject(host, machine(environ=environ), load_recipe("qwen2.5-7b-fp16-tp4-4090d")))
    assert result.verdict == ("warn" if says else "ok"), result
    assert says in f"{result.evidence} {result.hint}"
    if not says and environ:
        assert next(iter(environ.items()))[0] in result.evidence

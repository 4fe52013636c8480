"""The check of the embedded engine's PyTorch: real facts of this machine, and those of machines with GPUs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.doctor.conftest import FOUR, check
from trtqwen.doctor.embedded import TorchFacts, problems
from trtqwen.doctor.subject import Subject
from trtqwen.recipe import load_recipe
from trtqwen.system.host import Host

H100 = TorchFacts("2.11.0+cu130", "13.0", ((9, 0),) * 4, ("sm_80", "sm_90", "sm_100"), True, "/usr/bin/gcc", True)
ON_CARDS = "qwen2.5-7b-bf16-torch-tp4-h100"


def test_a_host_that_has_all_is_well() -> None:
    assert list(problems(H100, load_recipe(ON_CARDS))) == []
    later = replace(H100, devices=((8, 9),) * 4)  # sm_80 runs on it
    assert list(problems(later, load_recipe(ON_CARDS))) == []
    newest = replace(H100, devices=((12, 0),) * 4, architectures=("sm_90", "compute_90"))
    assert list(problems(newest, load_recipe(ON_CARDS))) == []


@pytest.mark.parametrize(
    ("changed", "level", "says"),
    [
        ({"cuda": None, "devices": ()}, "error", "is a CPU build: the engine cannot start"),
        ({"devices": ()}, "error", "PyTorch's CUDA 13.0 finds no device"),
        ({"devices": ((9, 0),) * 2}, "error", "the recipe needs 4 CUDA devices, and PyTorch sees 2"),
        ({"devices": ((12, 0),) * 4}, "error", "no kernels for compute capability 12.0, only for sm_80, sm_90"),
        ({"devices": ((7, 5),) * 4}, "error", "no kernels for compute capability 7.5"),
        ({"triton": False}, "warning", "the Triton language is not installed"),
        ({"compiler": None}, "error", "there is no C compiler"),
        ({"headers": False}, "error", "Python.h is missing"),
    ],
)
def test_what_is_missing_is_named(changed: dict[str, object], level: str, says: str) -> None:
    [problem] = problems(replace(H100, **changed), load_recipe(ON_CARDS))  # type: ignore[arg-type]
    assert says in problem.what
    assert (problem.level, bool(problem.hint)) == (level, True)


def test_without_gpus_the_cpu_computes() -> None:
    assert check("D42", Subject(Host(), recipe=load_recipe("qwen2-tiny-cpu"))).verdict == "ok"
    other = check("D42", Subject(Host(gpus=FOUR), recipe=load_recipe("qwen2.5-7b-bf16-tp1x4-4090d")))
    assert (other.verdict, other.evidence) == ("skip", "the recipe's backend is tensorrt_llm")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of PyTorch")
def test_this_pytorch_is_asked_for_real() -> None:
    found = check("D42", Subject(Host(gpus=FOUR), recipe=load_recipe(ON_CARDS)))
    assert (found.verdict, torch.__version__ in found.evidence) == ("fail", True)
    assert "is a CPU build" in found.evidence


def test_a_pytorch_that_does_not_import_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("torch") is not None
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = check("D42", Subject(Host(gpus=FOUR), recipe=load_recipe(ON_CARDS)))
    assert found.verdict == "fail"
    assert found.evidence == (
        "PyTorch cannot be imported: ImportError: libcudart.so.13: cannot open shared object file"
    )

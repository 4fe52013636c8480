from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from trtqwen.engine.provenance import check_provenance, provenance_of
from trtqwen.system.host import Gpu, Host

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
GPU = Gpu(0, "NVIDIA GeForce RTX 4090 D", "8.9", 24564, 300)
HOST = Host(tensorrt_llm="1.2.1", tensorrt="10.14.1.48", driver="590.44.01", gpus=(GPU,), image=IMAGE)


@pytest.fixture
def engine(checkpoint: Path, tmp_path: Path) -> Path:
    pretrained = json.loads((checkpoint / "config.json").read_text())
    limits = {"max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 64, "plugin_config": {"tokens_per_block": 32}}
    content = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": limits}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "provenance.json").write_text(provenance_of(HOST, "key", {}, []).model_dump_json())
    return tmp_path


def told(engine: Path, **changes: object) -> list[str]:
    return [str(problem) for problem in check_provenance(engine, replace(HOST, **changes))]  # type: ignore[arg-type]


def test_the_machine_it_was_built_on_runs_it(engine: Path) -> None:
    assert told(engine) == []


@pytest.mark.parametrize(
    ("changes", "here"),
    [
        ({"tensorrt_llm": "1.1.0", "tensorrt": "10.13.3.9"}, "TensorRT-LLM 1.1.0 with TensorRT 10.13.3.9"),
        ({"tensorrt": "10.14.0.1"}, "TensorRT-LLM 1.2.1 with TensorRT 10.14.0.1"),
        ({"tensorrt_llm": None, "tensorrt": None}, "no TensorRT-LLM"),
    ],
)
def test_other_software_is_named_with_both_remedies(engine: Path, changes: dict[str, object], here: str) -> None:
    (problem,) = told(engine, **changes)
    assert "was built by TensorRT-LLM 1.2.1 with TensorRT 10.14.1.48" in problem
    assert f"here is {here}" in problem
    assert f"build it again here with `trtqwen build`, or serve it in {IMAGE}" in problem


def test_another_gpu_is_named(engine: Path) -> None:
    (problem,) = told(engine, gpus=(Gpu(0, "NVIDIA H200", "9.0", 143771, 0),))
    assert "RTX 4090 D with compute capability 8.9, here is NVIDIA H200 with 9.0" in problem
    (problem,) = told(engine, gpus=())
    assert "needs a GPU" in problem


def test_an_engine_built_by_hand_is_held_by_its_version(engine: Path) -> None:
    (engine / "provenance.json").unlink()
    assert told(engine) == []
    (problem,) = told(engine, tensorrt_llm="1.0.0")
    assert "was built by TensorRT-LLM 1.2.1, here is TensorRT-LLM 1.0.0" in problem
    assert IMAGE in problem


def test_a_torch_engine_runs_anywhere(bundled_engine: Callable[..., Path]) -> None:
    assert check_provenance(bundled_engine(1), Host()) == []

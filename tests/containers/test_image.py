"""Images against releases and drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.containers.test_commands import NEWEST, TINY, TP4, build_plan
from trtqwen.diagnostics import InputError
from trtqwen.facts.releases import images

GEFORCE, DATA_CENTER = "NVIDIA GeForce RTX 4090 D", "NVIDIA L40S"


CUDA_12, CUDA_13 = "1.0.0", "1.2.1"  # releases whose newest images have CUDA 12.9.1 and 13.1.0


DRIVERS = [  # release, driver, and what is said of them
    (CUDA_12, "520.61.05", "error"),
    (CUDA_12, "535.183.01", "warning"),
    (CUDA_12, "575.57.08", None),  # the driver that the image was built with
    (CUDA_12, "580.95.05", None),
    (CUDA_12, "590.48.01", None),
    (CUDA_13, "525.60.13", "error"),
    (CUDA_13, "575.57.08", "error"),
    (CUDA_13, "580.95.05", "warning"),
    (CUDA_13, "590.44.01", None),
    (CUDA_13, "590.48.01", None),
    (CUDA_13, "610.43.02", None),
]


@pytest.mark.parametrize("gpu", [GEFORCE, DATA_CENTER])
@pytest.mark.parametrize(
    ("release", "driver", "verdict"),
    DRIVERS,
)
def test_the_major_version_of_cuda_decides_about_the_driver(
    release: str, driver: str, verdict: str | None, gpu: str, tmp_path: Path
) -> None:
    """NVIDIA's rule, the same for all cards: CUDA 12 runs from 525 on, CUDA 13 from 580 on."""
    recipe = TP4.model_copy(update={"checkpoint": TP4.checkpoint.model_copy(update={"release": release})})
    if verdict != "error":
        warnings = build_plan(recipe, tmp_path, driver=driver, gpus=(gpu,)).warnings
        assert [warning.level for warning in warnings] == ([verdict] if verdict else [])
        return
    with pytest.raises(InputError) as caught:
        build_plan(recipe, tmp_path, driver=driver, gpus=(gpu,))
    assert f"or newer, here is {driver}" in caught.value.what
    assert ("GeForce cards have no forward compatibility" in caught.value.what) == (gpu == GEFORCE)
    assert "--skip-gates" in caught.value.hint
    (warning,) = build_plan(recipe, tmp_path, driver=driver, gpus=(gpu,), skip_gates=True).warnings
    assert warning.what == f"--skip-gates: {caught.value.what}"


def test_an_old_driver_is_refused_with_the_newest_image_it_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        build_plan(TP4, tmp_path, driver="575.57.08")
    tag, release = "25.10-trtllm-python-py3", "1.0.0"
    assert f"set checkpoint.release {release} for nvcr.io/nvidia/tritonserver:{tag}" in caught.value.hint
    older = TP4.model_copy(update={"checkpoint": TP4.checkpoint.model_copy(update={"release": release})})
    assert build_plan(older, tmp_path, driver="575.57.08").image.endswith(tag)


def test_drivers_at_the_edges(tmp_path: Path) -> None:
    assert build_plan(TP4, tmp_path, driver="600.1").image == NEWEST
    assert build_plan(TINY, tmp_path, driver="400.1").image == NEWEST  # needs no GPU
    with pytest.raises(InputError) as caught:
        build_plan(TP4, tmp_path, driver="470.10")
    assert caught.value.hint.startswith("update the driver; ")


def test_an_image_may_be_named_but_not_one_of_another_release(tmp_path: Path) -> None:
    digest = "registry.example/trtqwen@sha256:" + "0" * 64
    assert build_plan(TP4, tmp_path, image=digest, driver="400.1").command.count(digest) == 1
    old = next(image for image in images() if image.tensorrt_llm == "1.0.0").image
    with pytest.raises(InputError, match=r"holds TensorRT-LLM 1\.0\.0, but checkpoint.release is 1\.2\.1"):
        build_plan(TP4, tmp_path, image=old)
    ancient = TINY.model_copy(update={"checkpoint": TINY.checkpoint.model_copy(update={"release": "0.17.0"})})
    with pytest.raises(InputError, match=r"no known image holds checkpoint\.release 0\.17\.0.*--image"):
        build_plan(ancient, tmp_path)

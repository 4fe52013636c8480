"""The quality report of INT8 conversions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.verify.conftest import Make
from trtqwen.artifact.manifest import read_manifest
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.quantize.ranges import ACT_RANGES
from trtqwen.recipe import CheckpointRecipe
from trtqwen.verify.quality import QUALITY, QUALITY_PLOT, has_int8, quality_report


def test_the_report_is_part_of_the_checkpoint(bundled_checkpoint: Make, tmp_path: Path) -> None:
    ranges = bundled_checkpoint(kv_cache="int8").parent / "calibrated" / ACT_RANGES
    recipe = CheckpointRecipe(quant="int8_sq", per_channel=True, per_token=True, act_ranges=str(ranges))
    run_conversion(plan_conversion(MODEL, recipe), tmp_path / "out", inspect=quality_report)
    assert {QUALITY, QUALITY_PLOT} <= set(read_manifest(tmp_path / "out", "checkpoint").outputs)
    assert (tmp_path / "out" / QUALITY_PLOT).read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "out" / QUALITY).read_text())
    assert report["not_measured"] is None
    assert report["perplexity_increase"] < 0.02
    assert report["top1_agreement"] > 0.97
    assert sorted(report["worst_layers"]) == [0, 1, 2, 3]
    assert len(report["activation_outliers"]) == 4 * 7
    assert all(ratio >= 1 for ratio in report["activation_outliers"].values())
    assert len(report["k_proj_bias_norms"]) == 4
    assert 1 <= report["k_proj_bias_ratio"] < 8


def test_without_tokenizer_the_report_says_why_nothing_was_measured(
    hf_directory: Callable[..., Path], tmp_path: Path
) -> None:
    plan = plan_conversion(hf_directory(), CheckpointRecipe(quant="int8_wo"))
    run_conversion(plan, tmp_path / "out", inspect=quality_report)
    report = json.loads((tmp_path / "out" / QUALITY).read_text())
    assert report["not_measured"] == "the model has no tokenizer"
    assert "perplexity_increase" not in report
    assert report["activation_outliers"] == {}
    assert (tmp_path / "out" / QUALITY_PLOT).is_file()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (CheckpointRecipe(), False),
        (CheckpointRecipe(quant="int8_wo"), True),
        (CheckpointRecipe(kv_cache="int8"), True),
    ],
)
def test_only_int8_loses_something(recipe: CheckpointRecipe, expected: bool) -> None:
    assert has_int8(plan_conversion(MODEL, recipe)) is expected

"""Against checkpoints that NVIDIA's own converter wrote, bit for bit, in every precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.hf.source import HfModel
from trtqwen.quantize.calibrate import calibrate
from trtqwen.quantize.ranges import read_ranges, write_ranges
from trtqwen.recipe import CheckpointRecipe

GOLDEN = Path(__file__).parent.parent / "golden"
ROTARY_TABLES = {"embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq"}
CASES = sorted(GOLDEN.glob("g*/expected*"))
CALIBRATED = sorted(path.parent for path in GOLDEN.glob("g*/act_range.safetensors"))


def settings(case: Path, expected: str = "expected", **changes: Any) -> CheckpointRecipe:
    """The recipe that says what the case's command line said to NVIDIA's converter."""
    argv = json.loads((case / "case.json").read_text())["argv"]
    values = {flag: value for flag, value in zip(argv, [*argv[1:], ""], strict=True) if flag.startswith("-")}
    fields: dict[str, Any] = {
        "dtype": values["--dtype"],
        "tp_size": int(values.get("--tp_size", 1)),
        "pp_size": int(values.get("--pp_size", 1)),
    }
    if "--use_weight_only" in values:
        fields |= {"quant": "int8_wo", "int8_layout": "sm90" if expected.endswith("sm90") else "sm80"}
    if "-sq" in values:
        fields |= {"quant": "int8_sq", "sq_alpha": float(values["-sq"])}
        fields |= {"per_channel": "--per_channel" in values, "per_token": "--per_token" in values}
    if "--int8_kv_cache" in values:
        fields["kv_cache"] = "int8"
    if "--use_parallel_embedding" in values:
        fields["embedding_sharding"] = ["vocab", "hidden"][int(values["--embedding_sharding_dim"])]
    if (case / "act_range.safetensors").exists():
        fields["act_ranges"] = str(case / "act_range.safetensors")
    return CheckpointRecipe(**{**fields, **changes})


def test_all_cases_are_here() -> None:
    assert len(CASES) == 14  # thirteen cases, one of them in two layouts


@pytest.mark.parametrize("expected", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_checkpoint_equals_nvidias(expected: Path, tmp_path: Path) -> None:
    case = expected.parent
    run_conversion(plan_conversion(case / "hf", settings(case, expected.name)), tmp_path / "out", force=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((expected / "config.json").read_text())
    ranks = sorted(path.name for path in expected.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("rank*.safetensors")) == ranks
    for rank in ranks:
        ours, theirs = load_file(tmp_path / "out" / rank), load_file(expected / rank)
        assert set(ours) == set(theirs) - ROTARY_TABLES
        for name, tensor in ours.items():
            assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("case", CALIBRATED, ids=lambda path: path.name)
def test_calibrating_again_gives_nvidias_ranges(case: Path, tmp_path: Path) -> None:
    """From the same tokens: ranges to 1e-3 and INT8 codes to one step, as another machine's float16 allows."""
    source = HfModel(case / "hf")
    tokens = json.loads((case / "calib_token_ids.json").read_text())
    samples = tokens if isinstance(tokens, list) else tokens["token_ids"]
    ranges = calibrate(source, samples)
    for module, span in read_ranges(case / "act_range.safetensors", source.config.num_hidden_layers).items():
        np.testing.assert_allclose(ranges[module].x.max(), span.x.max(), rtol=1e-3)
        np.testing.assert_allclose(ranges[module].y.max(), span.y.max(), rtol=1e-3)
    write_ranges(ranges, tmp_path / "ranges.safetensors")
    again = settings(case, act_ranges=str(tmp_path / "ranges.safetensors"), int8_layout="plain")
    exact = settings(case, int8_layout="plain")
    for name, recipe in (("again", again), ("exact", exact)):
        run_conversion(plan_conversion(case / "hf", recipe), tmp_path / name, force=True)
    ours, theirs = (load_file(tmp_path / name / "rank0.safetensors") for name in ("again", "exact"))
    for name, tensor in theirs.items():
        if tensor.dtype == torch.int8:
            assert (ours[name].int() - tensor.int()).abs().max() <= 1, name
        else:
            # A scale divides two roundings to float16; a smoother's channel may be off by several of its bits.
            rtol = 3e-3 if "scal" in name else 8e-3
            torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=rtol, atol=1e-6, msg=name)

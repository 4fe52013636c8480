"""Against checkpoints that NVIDIA's own converter wrote, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trtqwen.checkpoint.convert import plan_conversion, run_conversion

GOLDEN = Path(__file__).parent.parent / "golden"
ROTARY_TABLES = {"embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq"}


@pytest.mark.parametrize("case", sorted(path.parent.name for path in GOLDEN.glob("*/case.json")))
def test_checkpoint_equals_nvidias(case: str, tmp_path: Path) -> None:
    argv = json.loads((GOLDEN / case / "case.json").read_text())["argv"]
    arguments = dict(zip(argv[::2], argv[1::2], strict=True))
    plan = plan_conversion(GOLDEN / case / "hf", arguments["--dtype"], int(arguments.get("--tp_size", 1)))
    run_conversion(plan, tmp_path / "out")
    expected = GOLDEN / case / "expected"

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((expected / "config.json").read_text())
    ranks = sorted(path.name for path in expected.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ranks
    for rank in ranks:
        ours, theirs = load_file(tmp_path / "out" / rank), load_file(expected / rank)
        assert set(ours) == set(theirs) - ROTARY_TABLES
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name

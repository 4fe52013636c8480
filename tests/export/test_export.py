"""Checkpoints of NVIDIA's converter back to Hugging Face: floats bit for bit, INT8 against its own formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import trtqwen
from tests.hf.layouts import LAYOUTS
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.checkpoint.sharding import Split
from trtqwen.diagnostics import CheckpointError, InputError
from trtqwen.export.export import plan_export, run_export
from trtqwen.export.gather import Checkpoint
from trtqwen.hf.config import load_config
from trtqwen.recipe import CheckpointRecipe

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(GOLDEN.glob("g*/expected*"))


def algo(case: Path) -> str:
    return json.loads((case / "config.json").read_text())["quantization"]["quant_algo"] or ""


FLOAT = [case for case in CASES if not algo(case)]
WEIGHT_ONLY = [case for case in CASES if algo(case) == "W8A16"]
SMOOTH = [case for case in CASES if "SQ" in algo(case)]


def name_of(case: Path) -> str:
    return f"{case.parent.name}-{case.name}"


def exported(case: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    run_export(plan_export(case, **options), output)
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", FLOAT, ids=name_of)
def test_floats_are_the_sources(case: Path, tmp_path: Path) -> None:
    """Bit for bit the Hugging Face model that NVIDIA's converter read, in the checkpoint's dtype."""
    tensors = exported(case, tmp_path / "out")
    source = {
        name: tensor
        for file in (case.parent / "hf").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    dtype = next(iter(tensors.values())).dtype
    assert set(tensors) == set(source) - ({"lm_head.weight"} if "tied" in case.parent.name.split("_") else set())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, source[name].to(dtype)), name
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((case.parent / "hf" / "config.json").read_text())
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
    ):
        assert ours[key] == theirs[key]


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    case = GOLDEN / "g03_f32src_auto_tp2_pp2_tied"
    run_export(plan_export(case / "expected"), tmp_path / "out", shard_bytes=100_000)
    assert len(list(tmp_path.glob("out/model-*.safetensors"))) > 2
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path).float() for path in (case / "hf", tmp_path / "out")]
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        one, other = (model(ids).logits for model in models)
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)  # float16 against float32
    assert torch.equal(one.argmax(-1), other.argmax(-1))


def test_the_attention_factor_of_yarn_comes_back(tmp_path: Path) -> None:
    """TensorRT-LLM's checkpoint holds mscale, Hugging Face's config attention_factor."""
    [layout] = [layout for layout in LAYOUTS if layout.name == "yarn-attention-small"]
    directory = layout.make(tmp_path)
    run_conversion(plan_conversion(directory, CheckpointRecipe(dtype="float32")), tmp_path / "checkpoint")
    run_export(plan_export(tmp_path / "checkpoint"), tmp_path / "out")
    scaling = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert scaling["attention_factor"] == pytest.approx(0.7)
    assert "mscale" not in scaling
    assert load_config(tmp_path / "out").rope_scaling == pytest.approx(load_config(directory).rope_scaling)


@pytest.mark.parametrize("case", WEIGHT_ONLY, ids=name_of)
def test_weight_only_is_what_compressed_tensors_reads(case: Path, tmp_path: Path) -> None:
    """Decompressed by the format's own library: within half a step of the source, rank by rank."""
    pytest.importorskip("compressed_tensors")
    tensors = exported(case, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    source = load_file(case.parent / "hf" / "model.safetensors")
    ranks = Checkpoint(case).config.mapping.tp_size
    for name in (name for name in source if name.endswith("_proj.weight")):
        module = name.removesuffix(".weight")
        packed = {key: tensors[f"{module}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
        weight = decompressed(packed, content, module)
        wide = source[name].to(packed["weight_scale"].dtype).float()
        row_parallel = module.endswith(("o_proj", "down_proj"))
        parts = wide.chunk(ranks if row_parallel else 1, dim=1)
        step = torch.cat([(part.abs().amax(1, keepdim=True) / 128).expand_as(part) for part in parts], dim=1)
        error = ((weight.float() - wide).abs() / step.clamp(min=1e-9)).numpy()
        assert np.percentile(error, 99) <= 0.8  # the scales are rounded to 16 bits
        assert error.max() <= 1.4  # the largest positive value of a row is cut off at 127


def decompressed(packed: dict[str, torch.Tensor], content: dict[str, Any], module: str) -> torch.Tensor:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    QuantizationConfig.model_validate(content)
    groups = content["config_groups"].values()
    suffix = module.rsplit(".", 1)[-1]
    scheme = next(g for g in groups if any(suffix in target for target in g["targets"]) or g["targets"] == ["Linear"])
    scheme = QuantizationScheme.model_validate(scheme)
    weight: torch.Tensor = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return weight


@pytest.mark.parametrize("case", WEIGHT_ONLY, ids=name_of)
def test_weight_only_with_int8_inputs(case: Path, tmp_path: Path) -> None:
    tensors = exported(case, tmp_path / "out", activations="int8")
    source = load_file(case.parent / "hf" / "model.safetensors")
    for name in (name for name in source if name.endswith("_proj.weight")):
        weight = tensors[name].float() * tensors[f"{name}_scale"]
        step = source[name].float().abs().amax(1, keepdim=True) / 128
        assert ((weight - source[name].float()).abs() / step.clamp(min=1e-9)).quantile(0.99) <= 1.05


@pytest.mark.parametrize("case", SMOOTH, ids=name_of)
def test_smoothquant_keeps_the_product(case: Path, tmp_path: Path) -> None:
    """Matrices and norms together are the source's: what smoothing multiplies into one it divides out of another."""
    tensors = exported(case, tmp_path / "out")
    source = load_file(case.parent / "hf" / "model.safetensors")
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    static = content["config_groups"]["group_0"]["input_activations"]["strategy"] == "tensor"

    def matrix(name: str, of: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = of[f"{name}.weight"].float()
        return weight * of[f"{name}.weight_scale"] if f"{name}.weight_scale" in of else weight

    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for norm, modules in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj",)),
        ):
            for module in modules:
                ours = matrix(f"{prefix}.{module}", tensors) * tensors[f"{prefix}.{norm}.weight"].float()
                theirs = matrix(f"{prefix}.{module}", source) * source[f"{prefix}.{norm}.weight"].float()
                assert (ours - theirs).norm() / theirs.norm() < 0.02, module
        smoother = smoothers(case, f"transformer.layers.{layer}.mlp.proj.smoother")
        up = matrix(f"{prefix}.mlp.up_proj", tensors) * smoother[:, None]
        gain = tensors[f"{prefix}.post_attention_layernorm.weight"].float()
        truth = matrix(f"{prefix}.mlp.up_proj", source) * source[f"{prefix}.post_attention_layernorm.weight"].float()
        assert (up * gain - truth).norm() / truth.norm() < 0.02
        down = matrix(f"{prefix}.mlp.down_proj", tensors) / smoother
        assert (down - matrix(f"{prefix}.mlp.down_proj", source)).norm() / down.norm() < 0.02
        assert tensors[f"{prefix}.self_attn.o_proj.weight"].dtype in (torch.float16, torch.bfloat16)
        dense = matrix(f"{prefix}.self_attn.o_proj", tensors)
        assert (dense - matrix(f"{prefix}.self_attn.o_proj", source)).norm() / dense.norm() < 0.02
        assert (f"{prefix}.mlp.down_proj.input_scale" in tensors) == static
    assert [note.code for note in plan_export(case).notes if note.code == "smoother"]


def smoothers(case: Path, name: str) -> torch.Tensor:
    ranks = [load_file(file) for file in sorted(case.glob("rank*.safetensors"))]
    return torch.cat([rank[name].reshape(-1) for rank in ranks])


def test_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json"):
        plan_export(tmp_path)
    with pytest.raises(InputError, match="not INT8 weight-only"):
        plan_export(FLOAT[0], "int8")


def test_layouts_are_told_apart() -> None:
    for case in WEIGHT_ONLY:
        checkpoint = Checkpoint(case)
        checkpoint.weight_only(0, "mlp.fc", Split.COLUMN)
        assert checkpoint._int8_layout == ("sm90" if case.name.endswith("sm90") else "sm80")


def test_the_command(tmp_path: Path) -> None:
    words = ["export", str(GOLDEN / "g07_int8wo_fp16_tp2" / "expected"), "--output", str(tmp_path / "out")]
    words += ["--activations", "int8", "--json"]
    done = trtqwen(*words)
    assert done.returncode == 0, done.stderr
    notes = {note["code"] or note["level"] for note in json.loads(done.stdout)["notes"]}
    assert notes == {"requantized", "warning"}  # tensor-parallel rows, and no tokenizer
    again = trtqwen(*words)
    assert again.returncode == 2
    assert "exists" in again.stderr

"""Correct checkpoints pass in every precision, NVIDIA's own included; broken ones are found and the place named."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import trtqwen
from tests.errors import parse_error
from tests.slow import SLOW, every, slow
from tests.verify.conftest import Make, Tensors, mutated
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import CheckpointError, SourceError
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.texts import HELDOUT
from trtqwen.recipe import CheckpointRecipe
from trtqwen.verify.head import LogitsComparer
from trtqwen.verify.reference import transformers_reference
from trtqwen.verify.run import verify
from trtqwen.verify.samples import read_samples
from trtqwen.verify.verdict import plausible_perplexity, thresholds

GOLDEN = Path(__file__).parent.parent / "golden"
SQ: dict[str, Any] = {"quant": "int8_sq", "per_channel": True, "per_token": True}
STATIC: dict[str, Any] = {"quant": "int8_sq", "per_channel": True}
WO: dict[str, Any] = {"quant": "int8_wo", "int8_layout": "sm80"}
LAYER = "transformer.layers"


def random_samples(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (count,), generator=generator).tolist() for count in (96, 40)]


@pytest.mark.parametrize(
    "options",
    [
        slow({"dtype": "float16"}),
        slow({"dtype": "bfloat16", "tp_size": 2}),
        slow({"dtype": "float32", "tp_size": 4}),
        slow({"dtype": "float16", "pp_size": 2, "tp_size": 2}),
        slow({"dtype": "float16", "tp_size": 2, "embedding_sharding": "vocab"}),
        {"dtype": "float16", "tp_size": 2, "embedding_sharding": "hidden"},
        slow({"quant": "int8_wo"}),
        slow({"quant": "int8_wo", "int8_layout": "sm80", "tp_size": 2, "dtype": "float16"}),
        {"quant": "int8_wo", "int8_layout": "sm90", "pp_size": 2},
        slow({"quant": "int8_sq"}),
        slow({"quant": "int8_sq", "per_channel": True, "tp_size": 2}),
        slow({"quant": "int8_sq", "per_token": True, "dtype": "float16"}),
        slow({"quant": "int8_sq", "per_channel": True, "per_token": True, "tp_size": 2, "pp_size": 2}),
        slow({"kv_cache": "int8", "dtype": "float16", "tp_size": 2}),
        {"quant": "int8_wo", "int8_layout": "sm80", "kv_cache": "int8"},
        slow({"quant": "int8_sq", "kv_cache": "int8"}),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_correct_checkpoints_pass(
    bundled_checkpoint: Make, samples: list[list[int]], options: dict[str, Any]
) -> None:
    result = verify(bundled_checkpoint(**options), MODEL, samples)
    assert result.problems == []
    assert result.comparison is not None
    limits = result.thresholds
    for layer in result.comparison.layers:  # as `Thresholds` says of itself
        assert layer.attention_error < limits.attention_error / 2
        assert layer.mlp_error < limits.mlp_error / 2
    assert result.comparison.head.kl_mean < limits.kl / 2


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"dtype": "float16", "tp_size": 8}, {}),
        ({"dtype": "bfloat16", "tp_size": 2}, {"tie_word_embeddings": True}),
        ({"dtype": "bfloat16", "tp_size": 8, "embedding_sharding": "vocab"}, {"num_key_value_heads": 2}),
        ({"dtype": "float16", "pp_size": 3}, {"num_hidden_layers": 5}),
        ({"quant": "int8_wo", "int8_layout": "sm80", "tp_size": 2}, {"intermediate_size": 288}),
        (
            {"dtype": "float32"},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
        ({"dtype": "float32", "yarn_factor": 2.0}, {}),
    ],
    ids=["kv-repeated", "tied", "odd-vocabulary", "uneven-pipeline", "padded", "yarn", "stretched"],
)
def test_correct_checkpoints_of_odd_models_pass(
    hf_directory: Callable[..., Path], tmp_path: Path, options: dict[str, Any], model: dict[str, Any]
) -> None:
    directory = hf_directory(**model)
    run_conversion(plan_conversion(directory, CheckpointRecipe(**options)), tmp_path / "out")
    result = verify(tmp_path / "out", directory, random_samples(515))
    assert result.problems == []


@pytest.mark.parametrize("case", every(4, sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))))
def test_nvidias_own_checkpoints_pass(case: str) -> None:
    """Their models are random: many tokens are nearly as probable as the best, so the best is seldom the same."""
    expected, model = GOLDEN / case / "expected", GOLDEN / case / "hf"
    result = verify(expected, model, random_samples(500), int8_layout="sm80", limits={"top1": 0.7})
    assert result.problems == []


Change = Callable[[list[Tensors], dict[str, Any]], None]


def swap(first: str, second: str) -> Change:
    def change(ranks: list[Tensors], config: dict[str, Any]) -> None:
        for rank in ranks:
            rank[first], rank[second] = rank[second], rank[first]

    return change


def scale(name: str, factor: float, ranks_changed: slice = slice(None)) -> Change:
    def change(ranks: list[Tensors], config: dict[str, Any]) -> None:
        for rank in ranks[ranks_changed]:
            rank[name] = rank[name] * factor

    return change


def exchange_ranks(ranks: list[Tensors], config: dict[str, Any]) -> None:
    ranks.reverse()


def neutral_smoother(ranks: list[Tensors], config: dict[str, Any]) -> None:
    ranks[0][f"{LAYER}.0.attention.dense.smoother"].fill_(1)


def swap_kv_heads(ranks: list[Tensors], config: dict[str, Any]) -> None:
    """Key heads 0 and 1 of layer 3: behind 8 query heads of 32 rows each."""
    for name in ("weight", "bias"):
        tensor = ranks[0][f"{LAYER}.3.attention.qkv.{name}"]
        tensor[256:320] = torch.cat([tensor[288:320], tensor[256:288]])


def shift_layers(ranks: list[Tensors], config: dict[str, Any]) -> None:
    for rank in ranks:
        old = dict(rank)
        for name in rank:
            if name.startswith(LAYER):
                index, _, rest = name.removeprefix(f"{LAYER}.").partition(".")
                rank[name] = old[f"{LAYER}.{(int(index) + 1) % 4}.{rest}"]


def stale_head(ranks: list[Tensors], config: dict[str, Any]) -> None:
    ranks[1]["lm_head.weight"][-3:] += 0.01


def stale_embedding(ranks: list[Tensors], config: dict[str, Any]) -> None:
    ranks[1]["transformer.vocab_embedding.weight"][7] *= 1.01


def not_a_number(ranks: list[Tensors], config: dict[str, Any]) -> None:
    ranks[1][f"{LAYER}.2.mlp.proj.weight"][3, 5] = float("nan")


def drop(name: str) -> Change:
    def change(ranks: list[Tensors], config: dict[str, Any]) -> None:
        del ranks[0][name]

    return change


def other_rotary_base(ranks: list[Tensors], config: dict[str, Any]) -> None:
    config["rotary_base"] = 10000.0


@pytest.mark.parametrize(
    ("options", "change", "found"),
    [
        slow(
            {"tp_size": 2},
            swap(f"{LAYER}.2.mlp.fc.weight", f"{LAYER}.2.mlp.gate.weight"),
            "layer 2 is wrong: its mlp",
        ),
        slow(SQ, swap(f"{LAYER}.1.mlp.fc.weight", f"{LAYER}.1.mlp.gate.weight"), "layer 1 is wrong: its mlp"),
        slow({"tp_size": 2}, exchange_ranks, "4096 rows of lm_head.weight"),
        slow({"tp_size": 2, "embedding_sharding": "hidden"}, exchange_ranks, "rows of transformer.vocab_embedding"),
        ({"pp_size": 2}, exchange_ranks, "rank0.safetensors: tensor 'lm_head.weight' is not expected"),
        slow({}, scale(f"{LAYER}.1.attention.qkv.bias", 0), "layer 1 is wrong: its attention"),
        slow(WO, scale(f"{LAYER}.1.attention.qkv.bias", 0), "layer 1 is wrong: its attention"),
        slow(STATIC, scale(f"{LAYER}.3.attention.qkv.bias", 0), "layer 3 is wrong: its attention"),
        (SQ, neutral_smoother, "layer 0 is wrong: its attention"),
        slow(STATIC, neutral_smoother, "layer 0 is wrong: its attention"),
        (SQ, drop(f"{LAYER}.0.mlp.proj.smoother"), "tensor 'transformer.layers.0.mlp.proj.smoother' is missing"),
        slow({}, swap_kv_heads, "layer 3 is wrong: its attention"),
        ({"kv_cache": "int8"}, swap_kv_heads, "layer 3 is wrong: its attention"),
        slow(WO, scale(f"{LAYER}.1.mlp.proj.per_channel_scale", 2), "layer 1 is wrong: its mlp"),
        slow(STATIC, scale(f"{LAYER}.2.attention.dense.act_scale", 2), "layer 2 is wrong: its attention"),
        (STATIC, scale(f"{LAYER}.2.post_layernorm.scale_to_int", 2), "layer 2 is wrong: its mlp"),
        slow({"tp_size": 2}, scale(f"{LAYER}.0.input_layernorm.weight", 1.05, slice(1, 2)), "layer 0 is wrong"),
        ({}, shift_layers, "; 3 more layers are beyond it"),
        ({"tp_size": 2}, stale_head, "3 rows of lm_head.weight are not the model's"),
        ({"tp_size": 2}, stale_embedding, "1 rows of transformer.vocab_embedding.weight"),
        ({"tp_size": 2}, not_a_number, "rank1.safetensors: transformer.layers.2.mlp.proj.weight holds infinities"),
        ({}, other_rotary_base, "rotary_base 10000.0, but the model has 1000000.0"),
    ],
)
def test_mutations_are_found_and_named(
    bundled_checkpoint: Make,
    samples: list[list[int]],
    tmp_path: Path,
    options: dict[str, Any],
    change: Change,
    found: str,
) -> None:
    broken = mutated(bundled_checkpoint(**({"dtype": "float16"} | options)), tmp_path / "broken", change)
    result = verify(broken, MODEL, samples[:2], int8_layout=options.get("int8_layout"))
    assert found in result.problems[0]
    assert result.diagnostic is not None
    assert found in result.diagnostic.what
    assert result.diagnostic.hint


def test_the_wrong_int8_layout_is_found_and_the_missing_one_asked_for(
    bundled_checkpoint: Make, samples: list[list[int]], tmp_path: Path
) -> None:
    checkpoint = bundled_checkpoint(dtype="float16", **WO)
    assert "is wrong" in verify(checkpoint, MODEL, samples[:1], int8_layout="sm90").problems[0]
    nameless = mutated(checkpoint, tmp_path / "nameless", lambda ranks, config: None)
    with pytest.raises(CheckpointError, match="pass --int8-layout"):
        verify(nameless, MODEL, samples[:1])


def test_activations_near_the_end_of_float16_fail_in_float16_only(
    bundled_checkpoint: Make, samples: list[list[int]]
) -> None:
    [problem] = verify(bundled_checkpoint(dtype="float16"), MODEL, samples, limits={"max_activation": 10}).problems
    assert "activations of layer 3 reach 12, and float16 ends at 65504" in problem
    assert verify(bundled_checkpoint(dtype="bfloat16"), MODEL, samples, limits={"max_activation": 10}).problems == []


def test_another_model_is_refused(bundled_checkpoint: Make, hf_directory: Callable[..., Path]) -> None:
    result = verify(bundled_checkpoint(dtype="float16"), hf_directory(), [[1, 2]])
    assert "config.json says vocab_size 4096, but the model has 515" in result.problems[0]
    assert result.comparison is None


@SLOW
def test_int8_costs_the_bundled_model_little(bundled_checkpoint: Make) -> None:
    """The issue's limits."""
    many = read_samples(MODEL, HELDOUT, 4000)
    for options, limit in (({"quant": "int8_wo"}, 0.005), (SQ, 0.02)):
        comparison = verify(bundled_checkpoint(**options), MODEL, many).comparison
        assert comparison is not None
        assert comparison.head.perplexity_increase < limit


def test_streamed_logits_give_the_plain_formulas() -> None:
    torch.manual_seed(1)
    ours, theirs = 3 * torch.randn(50, 1000), 3 * torch.randn(50, 1000)
    targets = torch.randint(1000, (50,))
    comparer = LogitsComparer(targets)
    for start in range(0, 1000, 300):
        comparer.add(start, theirs[:, start : start + 300], ours[:, start : start + 300])
    result = comparer.result()
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    rows = torch.arange(50)
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl_max == pytest.approx(float(kl.max()), rel=1e-5)
    assert result.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result.model_perplexity == pytest.approx(float((-p[rows, targets]).mean().exp()), rel=1e-5)
    assert result.checkpoint_perplexity == pytest.approx(float((-q[rows, targets]).mean().exp()), rel=1e-5)


def test_limits_grow_with_the_coarseness_of_the_precision() -> None:
    floats = [thresholds(CheckpointRecipe(dtype=dtype)).mlp_error for dtype in ("float32", "float16", "bfloat16")]
    int8 = [thresholds(CheckpointRecipe(**options)).mlp_error for options in (WO, SQ, STATIC)]
    assert [*floats, *int8] == sorted([*floats, *int8])
    assert thresholds(CheckpointRecipe(dtype="float16", kv_cache="int8")).attention_error > 0.1


def test_the_command(bundled_checkpoint: Make, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        checkpoint = bundled_checkpoint(quant="int8_wo")
        return trtqwen("verify", checkpoint, "--model", MODEL, *arguments)

    good = run("--max-tokens", 96, "--report", tmp_path / "report", "--json")
    assert (good.returncode, good.stderr) == (0, "")
    printed = json.loads(good.stdout)
    assert printed["ok"]
    assert printed == json.loads((tmp_path / "report" / "verify.json").read_text())
    assert (tmp_path / "report" / "verify.png").read_bytes().startswith(b"\x89PNG")

    bad = run("--max-tokens", 96, "--max-layer-error", 0.001)
    assert bad.returncode == 1
    assert "is wrong: its " in bad.stderr
    parse_error(bad.stderr)


def test_a_model_without_tokenizer_is_refused(hf_directory: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer\.json"):
        read_samples(hf_directory(), HELDOUT, 100)


def test_a_model_that_predicts_nothing_is_not_agreed_with(tmp_path: Path, samples: list[list[int]]) -> None:
    """Checkpoint and reference come from one reading of the files: equal, and both wrong."""
    directory = Path(shutil.copytree(MODEL, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    run_conversion(plan_conversion(directory, CheckpointRecipe(dtype="float32")), tmp_path / "out")
    result = verify(tmp_path / "out", directory, samples)
    assert "config.json or weights are not those that it was trained with" in result.problems[0]
    assert result.diagnostic is not None
    assert "take all files from one model" in result.diagnostic.hint
    assert verify(tmp_path / "out", directory, samples, limits={"model_perplexity": 1e12}).problems == []
    assert plausible_perplexity([[0, 1, 2] * 200], 4096) == pytest.approx(3, rel=1e-3)
    assert plausible_perplexity([[0, 1]], 4096) == 40960


def test_transformers_is_a_second_reference(
    bundled_checkpoint: Make, samples: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = bundled_checkpoint(dtype="float32")
    result = verify(checkpoint, MODEL, samples[:1], texts=["Hello", "你好"])
    assert result.problems == []
    assert result.reference is not None
    assert result.comparison is not None
    assert result.reference.perplexity == pytest.approx(result.comparison.head.model_perplexity, rel=1e-4)
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda self, text: [1])
    misread = transformers_reference(MODEL, samples[:1], ["Hello"], 2 * result.reference.perplexity)
    assert ["perplexity" in misread.problems[0], "other token ids for 'Hello'" in misread.problems[1]] == [True, True]

"""Whole plans: what they find, that they never fail, and that no byte is lost."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console

from tests.plan.recipes import make_recipe, recipes
from trtqwen.checkpoint.checks import check_settings
from trtqwen.checkpoint.convert import plan_conversion
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.demo import MODEL
from trtqwen.diagnostics import Diagnostic, InputError, SourceError, TrtQwenError
from trtqwen.hf.config import stretched
from trtqwen.hf.known import known_config, model_names
from trtqwen.plan.plan import plan_recipe
from trtqwen.plan.show import print_comparison, print_plan
from trtqwen.plan.speed import Forecast
from trtqwen.recipe import CheckpointRecipe, Recipe, load_recipe, recipe_names
from trtqwen.safetensors_io.format import TensorSpec
from trtqwen.safetensors_io.writer import SafetensorsWriter


def found(name: str, recipe: Recipe, model: Path | None = None) -> Diagnostic | None:
    return next((finding for finding in plan_recipe(recipe, model).findings if finding.code == name), None)


def refused_by_check(recipe: Recipe) -> bool:
    config = known_config(str(recipe.model))
    asked = recipe.checkpoint
    try:
        changed = stretched(config, asked.yarn_factor) if asked.yarn_factor else config
        check_settings(changed, RankMapping(asked.tp_size, asked.pp_size), asked)
    except TrtQwenError:
        return True
    return False


@given(recipes())
@settings(max_examples=150, deadline=None)
def test_any_recipe_is_planned_and_no_byte_is_lost(recipe: Recipe) -> None:
    try:
        plan = plan_recipe(recipe)
    except TrtQwenError:
        assert refused_by_check(recipe)
        return
    for rank in plan.memory:
        parts = rank.context + rank.weights.total + rank.activations + rank.buffers + rank.kv_pool + rank.unused
        assert rank.card is None or parts == rank.card
        assert rank.unused >= 0 or rank.kv_pool == 0
    json.dumps(plan.as_json(), allow_nan=False)
    print_plan(plan, Console(file=io.StringIO(), width=80))
    full = plan.concurrency[-1]
    assert plan.fits == (full.by_blocks > 0 and not any(finding.code == "context" for finding in plan.findings))
    assert all(at_once.by_blocks * at_once.tokens <= plan.kv_tokens for at_once in plan.concurrency)


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, trtqwen.cli.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_fits_and_serves_at_least_two_full_requests(name: str) -> None:
    plan = plan_recipe(load_recipe(name))
    assert plan.fits
    assert plan.concurrency[-1].sequences >= 2
    assert {finding.code for finding in plan.findings} <= {"layout", "float16"}


def test_what_does_not_fit() -> None:
    heavy = plan_recipe(make_recipe("qwen2.5-32b"))
    assert (heavy.fits, heavy.speed, heavy.kv_tokens) == (False, None, 0)
    assert heavy.findings[0].code == "memory"
    assert heavy.memory[0].unused < 0
    assert heavy.findings[0].hint == "take TP4 x 1, which fits"
    assert plan_recipe(make_recipe("qwen2.5-72b")).findings[0].hint.startswith("raise checkpoint.tp_size")
    small = make_recipe(checkpoint={"yarn_factor": 32.0}, engine={"max_seq_len": 200_000})
    finding = found("kv-cache", small)
    assert finding is not None
    assert "holds 127,424 tokens" in finding.what
    assert "lower engine.max_seq_len to 127424" in finding.hint
    shorter = make_recipe(checkpoint={"yarn_factor": 32.0}, engine={"max_seq_len": 127_424})
    assert plan_recipe(shorter).fits
    capped = found("kv-cache", make_recipe(serve={"max_tokens_in_paged_kv_cache": 1024}))
    assert capped is not None
    assert "max_tokens_in_paged_kv_cache" in capped.hint
    serve = {"max_tokens_in_paged_kv_cache": 10**6}  # more than there is room for
    uncapped = found("kv-cache", small.model_copy(update={"serve": small.serve.model_copy(update=serve)}))
    assert uncapped is not None
    assert uncapped.hint == finding.hint


def test_serving_one_after_another() -> None:
    finding = found("sequential", make_recipe(checkpoint={"yarn_factor": 4.0}, engine={"max_seq_len": 120_000}))
    assert finding is not None
    assert "serving will be sequential" in finding.what
    assert found("sequential", make_recipe(engine={"max_batch_size": 1})) is not None
    assert found("sequential", make_recipe()) is None


def test_context_beyond_what_the_model_carries() -> None:
    finding = found("context", make_recipe(checkpoint={"tp_size": 4}, engine={"max_seq_len": 40_000}))
    assert finding is not None
    assert (finding.level, finding.hint) == (
        "error",
        "lower engine.max_seq_len to 32768, or stretch the context by checkpoint.yarn_factor: 2.0",
    )
    stretched_recipe = make_recipe(checkpoint={"tp_size": 4, "yarn_factor": 2.0}, engine={"max_seq_len": 65536})
    assert plan_recipe(stretched_recipe).fits
    note = found("yarn", make_recipe(checkpoint={"yarn_factor": 4.0}))
    assert note is not None
    assert note.level == "note"


def test_a_model_that_reads_far_by_itself_is_not_stretched(tmp_path: Path) -> None:
    """DeepSeek-R1-Distill-Qwen's 131,072 tokens, and QwQ's 40,960, are their own."""
    write_config(tmp_path, max_position_embeddings=131072)
    recipe = make_recipe(checkpoint={"tp_size": 4}, engine={"max_seq_len": 65536})
    assert found("yarn", recipe, tmp_path) is None
    assert plan_recipe(recipe, tmp_path).fits
    write_config(tmp_path, max_position_embeddings=40960)
    assert found("context", make_recipe(checkpoint={"tp_size": 4}, engine={"max_seq_len": 40960}), tmp_path) is None
    finding = found("context", recipe, tmp_path)
    assert finding is not None
    assert "checkpoint.yarn_factor: 2.0" in finding.hint


def test_dual_chunk_attention_ends_the_context(tmp_path: Path) -> None:
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    write_config(tmp_path, max_position_embeddings=1010000, rope_theta=1e7, dual_chunk_attention_config=chunks)
    assert found("context", make_recipe(checkpoint={"tp_size": 4}, engine={"max_seq_len": 262144}), tmp_path) is None
    beyond = found("context", make_recipe(checkpoint={"tp_size": 4}, engine={"max_seq_len": 300_000}), tmp_path)
    assert beyond is not None
    assert "dual_chunk_attention_config" in beyond.what
    assert beyond.hint == "lower engine.max_seq_len to 262144"


def test_a_directory_wins_over_the_recipes_model(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert plan_recipe(make_recipe(), tmp_path).memory == plan_recipe(make_recipe()).memory
    assert found("model", make_recipe(), tmp_path) is None
    write_config(tmp_path, num_hidden_layers=14)
    assert plan_recipe(make_recipe(), tmp_path).kv_tokens > 2 * plan_recipe(make_recipe()).kv_tokens
    finding = found("model", make_recipe(), tmp_path)
    assert finding is not None
    assert "num_hidden_layers 14 instead of 28" in finding.what


def test_a_recipe_without_a_model_needs_a_directory() -> None:
    recipe = make_recipe().model_copy(update={"model": None})
    with pytest.raises(InputError, match=r"names no model.*--model"):
        plan_recipe(recipe)
    plan = plan_recipe(recipe, MODEL)
    assert (plan.fits, plan.findings[0].hint) == (False, "lower engine.max_seq_len to 2048")


def test_parallel_sizes_that_the_model_does_not_allow() -> None:
    with pytest.raises(InputError, match=r"tp_size 4: does not divide the attention heads.*use tp_size 1, 2$"):
        plan_recipe(make_recipe("qwen2.5-0.5b", checkpoint={"tp_size": 4}))


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
def test_auto_is_the_dtype_of_conversion(source: str, tmp_path: Path) -> None:
    write_model(tmp_path, [1.0] * 4, torch_dtype=source)
    converted = plan_conversion(tmp_path, CheckpointRecipe())
    recipe = make_recipe(checkpoint={"dtype": "auto"}, engine={"max_seq_len": 64, "max_num_tokens": 64})
    assert plan_recipe(recipe, tmp_path).dtype == converted.dtype


def test_an_int8_kv_cache_is_judged_by_the_files(tmp_path: Path) -> None:
    recipe = make_recipe(
        checkpoint={"kv_cache": "int8"},
        engine={"use_paged_context_fmha": False, "max_seq_len": 64, "max_num_tokens": 64},
        serve={"enable_chunked_context": False},
    )
    published = found("int8-kv", recipe)
    assert published is not None
    assert "605 and 921" in published.what
    write_model(tmp_path, [1.0, 1.1, 0.9, 1.0])
    assert found("int8-kv", recipe, tmp_path) is None
    write_model(tmp_path, [27.0, 1.0, 1.0, 1.0, 42.0])
    finding = found("int8-kv", recipe, tmp_path)
    assert finding is not None
    assert "27 (layer 0), 42 (layer 4)" in finding.what


def test_float16_may_overflow() -> None:
    plain = found("float16", make_recipe(checkpoint={"dtype": "float16"}))
    guarded = found(
        "float16", make_recipe(checkpoint={"dtype": "float16"}, serve={"enable_context_fmha_fp32_acc": True})
    )
    assert plain is not None
    assert guarded is not None
    assert "especially" in plain.what
    assert "especially" not in guarded.what
    assert found("float16", make_recipe()) is None


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("max-num-tokens", {"engine": {"max_num_tokens": 16385}}),
        ("logits", {"engine": {"max_batch_size": 2048}}),
        ("logits", {"engine": {"gather_context_logits": True}}),
        ("idle-cards", {}),
        ("embedding", {"checkpoint": {"tp_size": 4}, "model": "qwen2.5-32b"}),
    ],
)
def test_the_other_findings(name: str, sections: dict[str, Any]) -> None:
    assert found(name, make_recipe(**sections)) is not None
    modest = make_recipe("qwen2.5-7b", checkpoint={"tp_size": 4}, engine={"max_num_tokens": 16384})
    assert found(name, modest) is None


def test_replicas_beside_tensor_parallelism() -> None:
    finding = found("layout", make_recipe(checkpoint={"tp_size": 4}))
    assert finding is not None
    assert "TP1 x 4 is likely to give 2.3 to 7.3 times the throughput of TP4 x 1" in finding.what
    assert "checkpoint.tp_size: 1 and serve.replicas: 4" in finding.hint
    assert found("layout", make_recipe(serve={"replicas": 4})) is None
    assert "many long requests" in finding.hint
    # Four ranks repeat the two KV heads of 1.5B, so that four replicas hold more.
    small = found("layout", make_recipe("qwen2.5-1.5b", checkpoint={"tp_size": 4}))
    assert small is not None
    assert "many long requests" not in small.hint
    stages = found("layout", make_recipe("qwen2.5-14b", checkpoint={"pp_size": 4}))
    assert stages is not None
    assert stages.hint.startswith("set checkpoint.tp_size: 2, pp_size: 1 and serve.replicas: 2")
    assert "latency" not in stages.hint
    # 131,072 tokens do not fit one card, and bfloat16 32B only all four.
    long = make_recipe(
        checkpoint={"tp_size": 2, "yarn_factor": 4.0}, engine={"max_seq_len": 131072}, serve={"replicas": 2}
    )
    assert found("layout", long) is None
    layouts = plan_recipe(make_recipe("qwen2.5-32b", checkpoint={"tp_size": 4})).layouts
    assert [layout.name for layout in layouts] == ["TP4 x 1"]


def test_published_scaling_lies_within_the_assumed_links() -> None:
    """vLLM: two cards in TP2 served 1.38 times the requests of one, under the same load."""

    def throughput(tp_size: int) -> Forecast:
        recipe = make_recipe(host={"gpus": tp_size}, checkpoint={"tp_size": tp_size}, engine={"max_batch_size": 80})
        return plan_recipe(recipe).layouts[0].throughput.forecast

    one, two = throughput(1), throughput(2)
    assert two.low / one.low < 1.38 < two.high / one.high


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_fits_the_terminal(width: int) -> None:
    for name in ("qwen2.5-7b-fp16-tp4-4090d", "qwen2-tiny-cpu"):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_plan(plan_recipe(load_recipe(name)), console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines)


def test_the_bar_is_true_to_scale() -> None:
    plan = plan_recipe(make_recipe())
    console = Console(file=io.StringIO(), width=100)
    print_plan(plan, console)
    bar = next(line for line in console.file.getvalue().splitlines() if line.startswith("▞▞"))  # type: ignore[attr-defined]
    assert len(bar) == 100
    rank = plan.memory[0]
    assert rank.card is not None
    for glyph, nbytes in (("█", rank.weights.total), ("░", rank.kv_pool), ("·", rank.unused)):
        assert bar.count(glyph) == pytest.approx(100 * nbytes / rank.card, abs=1)


def test_two_plans_side_by_side() -> None:
    plans = [plan_recipe(load_recipe(name)) for name in ("qwen2.5-7b-bf16-tp4-4090d", "qwen2-tiny-cpu")]
    console = Console(file=io.StringIO(), width=100)
    print_comparison((plans[0], plans[1]), console)
    rows = {line[:22].strip(): line[22:].split() for line in console.file.getvalue().splitlines()}  # type: ignore[attr-defined]
    assert rows["KV tokens, a replica"] == ["1,192,608", "8,192"]
    assert rows["one stream, at most"] == ["283", "-"]
    assert rows["one stream, forecast"] == ["83-193", "-"]


def write_config(directory: Path, **changes: Any) -> None:
    config = known_config("qwen2.5-7b").model_dump() | changes
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_model(directory: Path, bias_norms: list[float], torch_dtype: str = "bfloat16") -> None:
    """A model of a few bytes with k_proj biases of these norms."""
    layers = len(bias_norms)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": layers, "vocab_size": 4}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    write_config(directory, **sizes, **heads, torch_dtype=torch_dtype)
    tensors = {name: np.zeros(shape, np.float16) for name, shape in _shapes(layers)}
    for layer, norm in enumerate(bias_norms):
        tensors[f"model.layers.{layer}.self_attn.k_proj.bias"][0] = norm
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, [tensor])


def _shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (4, 8)), ("model.norm.weight", (8,))]
    shapes.append(("lm_head.weight", (4, 8)))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes += [(f"{prefix}.{norm}.weight", (8,)) for norm in ("input_layernorm", "post_attention_layernorm")]
        shapes += [(f"{prefix}.self_attn.{letter}_proj.bias", (8,)) for letter in "qkv"]
        shapes += [(f"{prefix}.self_attn.{letter}_proj.weight", (8, 8)) for letter in "qkvo"]
        shapes += [(f"{prefix}.mlp.{name}_proj.weight", (8, 8)) for name in ("gate", "up", "down")]
    return shapes


def test_every_known_model_has_a_plan_on_one_card_or_four() -> None:
    for model in model_names():
        tp_size = 4 if known_config(model).hidden_size >= 5120 else 1  # 14B and more
        plan = plan_recipe(make_recipe(model, checkpoint={"tp_size": tp_size}, engine={"max_seq_len": 2048}))
        assert plan.fits == (model != "qwen2.5-72b")


def test_a_plan_says_what_a_build_would_say(tmp_path: Path) -> None:
    """One reader for all: what is warned of, and what is refused."""
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"warp_factor": 9}))
    recipe = load_recipe("qwen2-tiny-cpu")
    assert any("warp_factor 9" in finding.what for finding in plan_recipe(recipe, model).findings)
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if x %}"}))
    with pytest.raises(SourceError, match="chat template 'default' is broken"):
        plan_recipe(recipe, model)

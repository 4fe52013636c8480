from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.standins import trtllm_build as standin
from trtqwen.diagnostics import EngineError
from trtqwen.engine.effective import changed_settings, check_promises
from trtqwen.engine.flags import (
    build_command,
    build_flags,
    check_against_help,
    check_command,
    command_line,
    flag_facts,
)
from trtqwen.facts.names import Release
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, KvCache, Quant, Recipe, load_recipe, recipe_names

RELEASES = [release for release in get_args(Release) if release != "0.17.0"]
RECIPES = [name for name in recipe_names() if load_recipe(name).engine.backend == "tensorrt_llm"]


def of_release(recipe: Recipe, release: str) -> Recipe:
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"release": release})})


def test_the_facts_are_those_of_the_reference() -> None:
    """The data file is held against a copy of the table it was made from."""
    reference = {flag["name"][2:]: flag for flag in standin.TABLE["flags"]}
    facts = flag_facts().flags
    assert set(facts) == set(reference)
    for name, flag in facts.items():
        theirs = reference[name]
        choices = theirs.get("choices")
        assert list(flag.choices) == (choices if isinstance(choices, list) else [])
        assert [f"--{alias}" for alias in flag.aliases] == theirs.get("aliases", [])
        assert (flag.kind == "switch") == (theirs["type"] == "flag")
        assert (flag.last == "1.0.0") == theirs["available"].startswith("<=1.0")
    removed = {part for entry in standin.TABLE["removed_before_0_18"] for part in entry.split(" ")[0].split("/")}
    assert {f"--{name}" for name in flag_facts().removed} == removed


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_bundled_recipe_builds_with_every_release(
    name: str, release: str, weightless: Callable[[Recipe], Path], tmp_path: Path
) -> None:
    recipe = of_release(load_recipe(name), release)
    engine = tmp_path / "engine"
    command = build_command(recipe, weightless(recipe), engine)
    check_command(command, recipe.checkpoint.release)
    standin.main(command[1:], release, gpus=4)
    config = json.loads((engine / "config.json").read_text())
    assert {path.name for path in engine.glob("rank*.engine")} == {
        f"rank{rank}.engine" for rank in range(recipe.world_size)
    }
    assert changed_settings(build_flags(recipe.engine, recipe.checkpoint), config) == []
    check_promises(config, recipe.serve)
    assert config["build_config"]["max_num_tokens"] == recipe.engine.max_num_tokens
    assert config["build_config"]["plugin_config"]["tokens_per_block"] == recipe.engine.tokens_per_block


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe that is accepted, made so that it is."""
    kv_cache = draw(st.sampled_from(get_args(KvCache)))
    paged = draw(st.booleans()) if kv_cache == "auto" else False
    chunked = draw(st.booleans()) if paged else False
    batch, block = draw(st.integers(1, 2048)), draw(st.sampled_from([8, 16, 32, 64, 128]))
    length = draw(st.integers(1, 40000))
    least = max(batch, block) if chunked else max(batch, block, length)
    tokens = least + draw(st.integers(0, 20000))
    profiles = draw(st.booleans())
    engine = {
        "backend": "tensorrt_llm",
        "max_batch_size": batch,
        "max_num_tokens": tokens,
        "max_seq_len": length,
        "opt_num_tokens": None if profiles else draw(st.none() | st.integers(1, tokens)),
        "multiple_profiles": profiles,
        "tokens_per_block": block,
        "gemm_plugin": draw(st.sampled_from(["auto", "float16", "bfloat16", "disable"])),
        "use_paged_context_fmha": paged,
        "logits_dtype": draw(st.sampled_from(["float32", "float16"])),
        "gather_context_logits": draw(st.booleans()),
        "workers": draw(st.integers(1, 8)),
    }
    return Recipe.model_validate(
        {
            "name": "any",
            "description": "any",
            "host": {"gpus": 8},
            "checkpoint": {"quant": draw(st.sampled_from(get_args(Quant))), "kv_cache": kv_cache},
            "engine": engine,
            "serve": {"enable_chunked_context": chunked},
        }
    )


@settings(max_examples=100, deadline=None)
@given(recipe=recipes(), gpus=st.none() | st.integers(1, 8))
def test_every_flag_of_any_recipe_exists_in_every_release(recipe: Recipe, gpus: int | None) -> None:
    for release in RELEASES:
        command = build_command(of_release(recipe, release), Path("c"), Path("e/engine"), gpus=gpus)
        args = standin.parser(release).parse_args(command[1:])
        check_command(command, release)
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "tokens_per_block", "opt_num_tokens"):
            assert getattr(args, name) == getattr(recipe.engine, name)
        assert args.workers == min(recipe.engine.workers, gpus or 8)
        assert args.use_paged_context_fmha == ("enable" if recipe.engine.use_paged_context_fmha else "disable")


def test_an_int8_kv_cache_takes_paged_context_fmha_away_whatever_is_asked() -> None:
    engine = EngineRecipe(backend="tensorrt_llm")
    assert build_flags(engine, CheckpointRecipe())["use_paged_context_fmha"] == "enable"
    assert build_flags(engine, CheckpointRecipe(kv_cache="int8"))["use_paged_context_fmha"] == "disable"


def test_nothing_lands_in_the_current_directory() -> None:
    command = build_command(load_recipe(RECIPES[0]), Path("home/checkpoint"), Path("home/engine"))
    args = standin.parser("1.2.1").parse_args(command[1:])
    assert args.output_timing_cache == args.input_timing_cache == "home/timing-1.2.1.cache"
    assert (args.checkpoint_dir, args.output_dir) == ("home/checkpoint", "home/engine")


@pytest.mark.parametrize(
    ("flags", "release", "message"),
    [
        ({"max_batch": 1}, "1.2.1", r"--max_batch: is not a flag of trtllm-build in 1\.2\.1"),
        (
            {"use_custom_all_reduce": "disable"},
            "1.0.0",
            r"--use_custom_all_reduce: .*the runtime decides",
        ),
        ({"max_output_len": 5}, "1.0.0", r"--max_output_len: .*use max_seq_len"),
        (
            {"auto_parallel": 4},
            "1.1.0",
            r"--auto_parallel: TensorRT-LLM 1\.1\.0 has removed it, 1\.0\.0 was the last",
        ),
        ({"nccl_plugin": "auto"}, "1.2.1", "--nccl_plugin: the builder sets it"),
        ({"reduce_fusion": "enable"}, "1.2.1", "--reduce_fusion: the builder forces it off"),
        ({"gemm_plugin": "int8"}, "1.2.1", r"--gemm_plugin: .*takes auto, float16.*got 'int8'"),
        ({"strip_plan": "enable"}, "1.2.1", "--strip_plan: takes no value"),
        ({}, "0.17.0", r"known from 0\.18\.0 on.*0\.17\.0"),
    ],
)
def test_flags_that_a_release_does_not_take_are_refused_by_name(
    flags: dict[str, int | str], release: Release, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        check_command(command_line(flags, Path("c"), Path("e"), release), release)
    if "auto_parallel" in flags:
        check_command(command_line(flags, Path("c"), Path("e"), "1.0.0"), "1.0.0")


def test_the_installed_program_has_the_last_word() -> None:
    parser = standin.parser("1.2.1")
    command = build_command(load_recipe(RECIPES[0]), Path("c"), Path("e"))
    check_against_help(command, parser.format_help())
    parser.add_argument("--brand_new", help="Takes the place of --max_seq_len.")
    parser.add_argument("-b", "--both", choices=["x", "y"])
    check_against_help(["trtllm-build", "--brand_new=1", "--both=x", "--max_decoder_seq_len=3"], parser.format_help())
    with pytest.raises(EngineError, match="--both: the installed trtllm-build takes x, y"):
        check_against_help(["trtllm-build", "--both=z"], parser.format_help())
    for name in ("tokens_per_block", "max_seq_len"):
        text = "\n".join(line for line in parser.format_help().splitlines() if f"  --{name}" not in line)
        with pytest.raises(EngineError, match=f"--{name}: the installed trtllm-build does not know it"):
            check_against_help(command, text)


def test_the_standin_refuses_as_argparse_does() -> None:
    for arguments in (["--max_batches=1"], ["--gemm_plugin=int8"], ["--multiple_profiles"], ["--workers=four"]):
        with pytest.raises(SystemExit) as caught:
            standin.parser("1.2.1").parse_args(arguments)
        assert caught.value.code == 2

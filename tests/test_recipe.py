from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtqwen.diagnostics import RecipeError
from trtqwen.recipe import load_recipe, recipe_names

GOOD = "description: d\nengine:\n  backend: torch\n"


@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_loads(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_4090d_recipe_says_what_its_name_says() -> None:
    recipe = load_recipe("qwen2.5-7b-fp16-tp4-4090d")
    assert (recipe.checkpoint.dtype, recipe.checkpoint.tp_size, recipe.engine.backend) == (
        "float16",
        4,
        "tensorrt_llm",
    )


def test_a_recipe_is_loaded_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert load_recipe(str(tmp_path / "mine.yaml")).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "  max_bath_size: 4\n", "'engine.max_bath_size' is unknown; did you mean 'engine.max_batch_size'"),
        (GOOD + "servee: {}\n", "field 'servee' is unknown; did you mean 'serve'"),
        (GOOD + "max_seq_len: 4\n", "field 'max_seq_len' is unknown; did you mean 'engine.max_seq_len'"),
        (GOOD + "  replicas: 4\n", "field 'engine.replicas' is unknown; did you mean 'serve.replicas'"),
        (GOOD + "  frobnicate: 4\n", "field 'engine.frobnicate' is unknown;"),
        (GOOD + "model: qwen25-7b\n", "model 'qwen25-7b' is unknown; use one of .*'?qwen2.5-7b"),
        (GOOD + "  max_batch_size: 0\n", "field 'engine.max_batch_size': input should be greater than 0"),
        (GOOD + "  max_batch_size: '8'\n", "field 'engine.max_batch_size': input should be a valid integer"),
        (GOOD + "  max_batch_size: 9000\n", "engine: max_num_tokens 8192 is less than 9000"),
        (GOOD + "checkpoint:\n  tp_size: 9\n", "field 'checkpoint.tp_size'"),
        (GOOD + "checkpoint:\n  pp_size: 5\n", "field 'checkpoint.pp_size'"),
        (GOOD + "checkpoint:\n  per_token: true\n", "checkpoint: per_channel and per_token are settings of quant"),
        (GOOD + "checkpoint:\n  int8_layout: sm80\n", "checkpoint: int8_layout is a setting of quant: int8_wo"),
        (GOOD + "checkpoint:\n  quant: int8_wo\n  dtype: float32\n", "INT8 weights need dtype float16 or bfloat16"),
        (GOOD + "checkpoint:\n  calib: some.txt\n", "calibration is for quant: int8_sq and kv_cache: int8 only"),
        (GOOD + "checkpoint:\n  kv_cache: int8\n  calib: a\n  act_ranges: b\n", "exclude each other"),
        (GOOD + "checkpoint:\n  dtype: int4\n", "field 'checkpoint.dtype'.*got 'int4'"),
        (GOOD + "serve:\n  kv_cache_free_gpu_mem_fraction: 1.5\n", "kv_cache_free_gpu_mem_fraction"),
        (GOOD + "serve:\n  batch_scheduler_policy: fastest\n", "batch_scheduler_policy"),
        (GOOD + "  use_paged_context_fmha: false\n", "enable_chunked_context needs"),
        (GOOD + "  max_num_tokens: 64\nserve:\n  enable_chunked_context: false\n", "cannot take a prompt"),
        (GOOD + "serve:\n  kv_cache_host_memory_bytes: 9\n", "is a setting of backend: tensorrt_llm"),
        (
            GOOD + "host: {card: h100-sxm, gpus: 3}\ncheckpoint: {tp_size: 2}\nserve: {replicas: 2}\n",
            "2 replicas of 2 ranks need 4 GPUs, but host.gpus is 3",
        ),
        (GOOD + "name: x\n", "remove the field"),
        ("description: d\n", "field 'engine' is missing;"),
        ("engine: [", "is not YAML"),
        ("- 1\n", "is not a mapping"),
        (
            GOOD + f"  max_seq_len: {10**400}\n",
            "'engine.max_seq_len': input should be less than or equal to 2147483647",
        ),
        ("[" * 10000, "is nested too deeply"),
    ],
)
def test_a_wrong_recipe_names_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_says_where_the_known_ones_are() -> None:
    with pytest.raises(RecipeError, match=r"nope: no such recipe; name one that `trtqwen recipe list` prints"):
        load_recipe("nope")
    with pytest.raises(RecipeError, match="did you mean 'qwen2-tiny-cpu'"):
        load_recipe("qwen2-tiny-gpu")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe("nope.yaml")


def test_changes_replace_fields() -> None:
    recipe = load_recipe("qwen2-tiny-cpu", ["engine.max_batch_size=3", "description=mine", "serve.replicas=1"])
    assert (recipe.engine.max_batch_size, recipe.description) == (3, "mine")
    assert recipe.name == "qwen2-tiny-cpu"


@pytest.mark.parametrize("before", [[], ["engine.vllm=null"], ["engine.vllm={served_name: mine}"]])
def test_changes_reach_sections_within_sections(before: list[str]) -> None:
    """Also those that the file leaves out."""
    changes = ["engine.backend=vllm", "engine.tokens_per_block=32", *before]
    changes += [
        "serve.batch_scheduler_policy=max_utilization",
        "engine.vllm.python=/opt/vllm/bin/python",
        "engine.vllm.arguments.enforce-eager=true",
    ]
    vllm = load_recipe("qwen2-tiny-cpu", changes).engine.vllm
    assert vllm is not None
    assert (vllm.python, vllm.arguments) == ("/opt/vllm/bin/python", {"enforce-eager": True})
    assert vllm.served_name == ("mine" if "mine" in str(before) else "trtqwen")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("engine.max_batch_size", "is not field=value; write it like engine.max_batch_size=32"),
        ("=3", "is not field=value"),
        ("engine.max_bath_size=3", "did you mean 'engine.max_batch_size'"),
        ("description.text=3", "description is not a section"),
        ("engine.max_batch_size.most=3", "engine.max_batch_size is not a section"),
        ("engine..max_batch_size=3", "is not field=value"),
        ("engine.vllm.pyton=x", "field 'engine.vllm.pyton' is unknown; did you mean 'engine.vllm.python'"),
        ("engine.llmapi.argument={}", "did you mean 'engine.llmapi.arguments'"),
        ("engine.served_name=x", "did you mean 'engine.vllm.served_name'"),
        ("engine.nothing.like.it=x", "field 'engine.nothing' is unknown; remove it"),
        ("engine.max_batch_size=many", "engine.max_batch_size"),
        ("engine.max_batch_size=[", "is not a YAML value"),
        ("name=other", "remove the field"),
    ],
)
def test_a_wrong_change_is_refused(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("qwen2-tiny-cpu", [change])

"""The memory of a card against the tables of the notes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plan.recipes import make_recipe
from tests.plan.tables import TABLES
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.hf.known import known_config
from trtqwen.plan.memory import GIB, activation_bytes, concurrency, kv_token_bytes, plan_memory
from trtqwen.recipe import load_recipe

CONFIG = known_config("qwen2.5-7b")
# What an INT8 KV cache asks of a recipe.
UNPAGED: dict[str, Any] = {
    "engine": {"use_paged_context_fmha": False, "max_seq_len": 8192},
    "serve": {"enable_chunked_context": False},
}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_kv_bytes(tp_size: int) -> None:
    key = str(tp_size)
    for value_bytes, index in ((2, 0), (1, 1)):
        token = kv_token_bytes(CONFIG, RankMapping(tp_size), 0, value_bytes)
        assert token == TABLES["kv_bytes_per_token"][key][index]
        for length, columns in TABLES["kv_gib"].items():
            assert int(length) * token / GIB == pytest.approx(columns[key][index], rel=0.01)
    assert 32 * kv_token_bytes(CONFIG, RankMapping(tp_size), 0, 2) == TABLES["kv_block_kib"][key] * 1024


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_activations(tp_size: int) -> None:
    token = activation_bytes(CONFIG, tp_size, 2)
    assert token / 1000 == pytest.approx(TABLES["activation_kb_per_token"][str(tp_size)], rel=0.01)
    assert 131072 * token / GIB == pytest.approx(TABLES["long_prompt_activations_gib"][str(tp_size)], rel=0.01)


@pytest.mark.parametrize(("model", "logged"), [("qwen2.5-0.5b", 773.5), ("qwen2.5-1.5b", 921.51)])
def test_the_rows_of_logits_are_part_of_the_activations(model: str, logged: float) -> None:
    """MiB of execution context in public logs of engines with trtllm-build's own limits.

    NVIDIA/TensorRT-LLM issue 1188, and a build of DeepSeek-R1-Distill-Qwen-1.5B on release 0.17.
    """
    engine = {"max_batch_size": 2048, "max_num_tokens": 8192, "max_seq_len": 1024}
    (rank,) = plan_memory(make_recipe(engine=engine), known_config(model), "float16")
    assert rank.activations / 2**20 == pytest.approx(logged, abs=0.02)


@pytest.mark.parametrize("row", TABLES["pool"], ids=lambda row: f"{row['quant']}-tp{row['tp_size']}")
def test_the_table_of_pools(row: dict[str, Any]) -> None:
    recipe = make_recipe(checkpoint={"quant": row["quant"], "tp_size": row["tp_size"]})
    (rank,) = plan_memory(recipe, CONFIG, "bfloat16")
    assert rank.activations / GIB == pytest.approx(row["activations"], rel=0.01)
    assert rank.buffers / GIB == pytest.approx(0.285, rel=0.01)
    # The table was made with 23.99 GiB of a card and 4.7 rows of the vocabulary a slot; measured are 23.64 and 6.8.
    less = 0.9 * (23.99 - 23.64 + (6.8 - 4.7) * 64 * 152064 * 4 / GIB)
    assert rank.kv_pool / GIB == pytest.approx(row["pool"] - less, rel=0.01)
    tokens = rank.kv_blocks * 32
    expected = row["tokens"] * (row["pool"] - less) / row["pool"]
    assert tokens == pytest.approx(expected, rel=0.01)
    for length in (32768, 131072):
        assert concurrency(recipe, rank.kv_blocks, length).sequences == tokens // length


# By hand, apart from this code, with 23.64 GiB: tokens of the KV cache, before 6.8 rows of the vocabulary a slot.
@pytest.mark.parametrize(
    ("name", "tokens", "token_bytes"),
    [
        ("qwen2.5-7b-bf16-tp4-4090d", 1_197_728, 14_336),
        ("qwen2.5-7b-int8-sq-tp1x4-4090d", 228_160, 57_344),
        ("qwen2.5-32b-int8-wo-tp4-4090d", 204_640, 65_536),
    ],
)
def test_hand_calculations(name: str, tokens: int, token_bytes: int) -> None:
    recipe = load_recipe(name)
    config = known_config(str(recipe.model))
    (rank,) = plan_memory(recipe, config, "bfloat16")
    rows = (6.8 - 4.7) * recipe.engine.max_batch_size * config.vocab_size * 4
    expected = tokens - recipe.serve.kv_cache_free_gpu_mem_fraction * rows / token_bytes
    assert rank.kv_blocks * 32 == pytest.approx(expected, abs=200)


def test_blocks_are_rounded_up_and_batches_are_capped() -> None:
    recipe = make_recipe(engine={"max_batch_size": 5})
    assert concurrency(recipe, 100, 32).by_blocks == 100
    assert concurrency(recipe, 100, 33).by_blocks == 50
    assert (concurrency(recipe, 9, 33).sequences, concurrency(recipe, 100, 33).sequences) == (4, 5)


def test_the_cap_on_tokens_counts_whole_blocks() -> None:
    (rank,) = plan_memory(make_recipe(serve={"max_tokens_in_paged_kv_cache": 1000}), CONFIG, "bfloat16")
    assert rank.kv_blocks == 31


def test_an_int8_kv_cache_holds_twice_the_tokens() -> None:
    plain, int8 = (
        plan_memory(make_recipe(checkpoint={"kv_cache": kind}, **UNPAGED), CONFIG, "bfloat16")[0]
        for kind in ("auto", "int8")
    )
    assert int8.block * 2 == plain.block
    assert int8.kv_blocks == pytest.approx(2 * plain.kv_blocks, abs=1)


def test_pipeline_stages_share_the_blocks_of_the_fullest() -> None:
    recipe = make_recipe("qwen2.5-14b", checkpoint={"pp_size": 4}, engine={"max_seq_len": 8192})
    ranks = plan_memory(recipe, known_config("qwen2.5-14b"), "bfloat16")
    assert [bool(rank.weights.embedding) for rank in ranks] == [True, False, False, False]
    assert [bool(rank.weights.lm_head) for rank in ranks] == [False, False, False, True]
    assert len({rank.kv_blocks for rank in ranks}) == 1
    fraction = recipe.serve.kv_cache_free_gpu_mem_fraction
    own = [int((rank.unused + rank.kv_pool) * fraction) // rank.block for rank in ranks]
    assert ranks[0].kv_blocks == min(own) < max(own)


def test_logits_of_prompts_and_of_a_large_batch() -> None:
    def buffers(**engine: Any) -> int:
        return plan_memory(make_recipe(engine=engine), CONFIG, "bfloat16")[0].buffers

    plain = buffers()
    assert buffers(gather_context_logits=True) - plain == 8192 * 152064 * 4
    assert plain - buffers(logits_dtype="float16") == 64 * 152064 * 2
    # 1.16 GiB is one buffer at 2048 requests.
    assert (buffers(max_batch_size=2048) - plain) / GIB == pytest.approx(6.8 * 1.16 * (2048 - 64) / 2048, rel=0.01)


def test_the_torch_engine_holds_float32_on_the_host() -> None:
    recipe = make_recipe().model_copy(update={"host": None})
    assert plan_memory(recipe, CONFIG, "bfloat16")[0].card is None
    assert plan_memory(recipe, CONFIG, "bfloat16")[0].weights.total == pytest.approx(2 * 14.185 * GIB, rel=0.001)

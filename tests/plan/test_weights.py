"""Weights against the tables of the notes, and byte for byte against the converter's own list of tensors."""

from __future__ import annotations

from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.plan.tables import TABLES
from trtqwen.checkpoint.checks import check_settings
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.rule import Precision
from trtqwen.checkpoint.sharding import Split
from trtqwen.checkpoint.tensors import RuleBook
from trtqwen.diagnostics import CheckpointError
from trtqwen.hf.config import HfConfig
from trtqwen.hf.known import known_config
from trtqwen.plan.memory import GIB, kv_token_bytes, pool_blocks
from trtqwen.plan.weights import RankWeights, rank_weights
from trtqwen.quantize.smoothquant import SmoothQuantMode
from trtqwen.recipe import CheckpointRecipe

SPLITS = {"none": Split.REPLICATED, "vocab": Split.VOCAB, "hidden": Split.ROW}
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def settings(quant: str, tp_size: int, sharding: str = "none") -> CheckpointRecipe:
    smooth = {"per_channel": True, "per_token": True} if quant == "int8_sq" else {}
    return CheckpointRecipe.model_validate(
        {"quant": quant, "tp_size": tp_size, "embedding_sharding": sharding, **smooth}
    )


def weights(model: str, quant: str, tp_size: int, sharding: str = "none") -> RankWeights:
    return rank_weights(known_config(model), settings(quant, tp_size, sharding), 2, 0)


@pytest.mark.parametrize("row", TABLES["weights_gib"], ids=lambda row: f"{row['quant']}-tp{row['tp_size']}")
def test_the_7b_table(row: dict[str, Any]) -> None:
    for column, sharding in (("replicated", "none"), ("sharded", "vocab"), ("sharded", "hidden")):
        if column in row:
            found = weights("qwen2.5-7b", row["quant"], row["tp_size"], sharding).total / GIB
            assert found == pytest.approx(row[column], rel=0.01)


@pytest.mark.parametrize("model", TABLES["models"])
def test_the_table_of_all_models(model: str) -> None:
    row = TABLES["models"][model]
    for quant, key in (("none", "bf16_tp1"), ("int8_wo", "int8_tp1")):
        one = weights(model, quant, 1)
        # The appendix counts a tied matrix once at TP1; the engine holds it twice, as the appendix counts at TP4.
        once = one.total - (one.lm_head if known_config(model).tie_word_embeddings else 0)
        assert once / GIB == pytest.approx(row[key], rel=0.01, abs=0.05)
    if row.get("tp4", True):
        assert weights(model, "none", 4, "vocab").total / GIB == pytest.approx(row["bf16_tp4"], rel=0.01)
        for sharding, expected in zip(("none", "vocab"), row["int8_tp4"], strict=True):
            assert weights(model, "int8_wo", 4, sharding).total / GIB == pytest.approx(expected, rel=0.01)
    else:
        with pytest.raises(CheckpointError, match="use tp_size 1, 2"):
            check_settings(known_config(model), RankMapping(4), settings("none", 4))


@pytest.mark.parametrize("model", [name for name, row in TABLES["models"].items() if row.get("tp4", True)])
def test_kv_tokens_of_all_models_under_the_appendix_own_assumptions(model: str) -> None:
    """22.5 GiB usable, 2.5 GiB held back, 90 % of the rest for the cache."""
    row, token = TABLES["models"][model], kv_token_bytes(known_config(model), RankMapping(4), 0, 2)
    assert token == row["kv_kib"] * 1024
    for quant, key in (("none", "bf16_tokens"), ("int8_wo", "int8_tokens")):
        free = int(20 * GIB) - weights(model, quant, 4, "vocab").total
        # The table is in whole thousands.
        assert pool_blocks(free, 0.9, 32 * token) * 32 == pytest.approx(row[key], rel=0.01, abs=1000)


@st.composite
def configs(draw: st.DrawFn) -> HfConfig:
    heads, head_size = draw(st.sampled_from([2, 4, 6, 8])), draw(st.sampled_from([16, 64]))
    return HfConfig(
        model_type="qwen2",
        hidden_size=heads * head_size * draw(st.sampled_from([1, 2])),
        intermediate_size=draw(st.integers(1, 40)) * 16,
        num_hidden_layers=draw(st.integers(1, 7)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([size for size in (1, 2, 4, 8) if heads % size == 0])),
        head_dim=head_size,
        vocab_size=draw(st.integers(1, 300)),
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
    )


@st.composite
def checkpoints(draw: st.DrawFn) -> CheckpointRecipe:
    quant = draw(st.sampled_from(["none", "int8_wo", "int8_sq"]))
    smooth = quant == "int8_sq"
    return CheckpointRecipe.model_validate(
        {
            "dtype": draw(st.sampled_from(["float16", "bfloat16"] + ["float32"] * (quant == "none"))),
            "tp_size": draw(st.sampled_from([1, 2, 4])),
            "pp_size": draw(st.integers(1, 3)),
            "quant": quant,
            "per_channel": smooth and draw(st.booleans()),
            "per_token": smooth and draw(st.booleans()),
            "kv_cache": draw(st.sampled_from(["auto", "int8"])),
            "int8_layout": draw(st.sampled_from(["plain", "sm80"])) if quant == "int8_wo" else "plain",
            "embedding_sharding": draw(st.sampled_from(["none", "vocab", "hidden"])),
        }
    )


@given(configs(), checkpoints())
@hypothesis.settings(deadline=None)
def test_every_byte_of_the_rank_files(config: HfConfig, asked: CheckpointRecipe) -> None:
    """A plain INT8 weight-only checkpoint is the exception: TensorRT-LLM quantizes it when it builds."""
    mapping = RankMapping(asked.tp_size, asked.pp_size)
    try:
        check_settings(config, mapping, asked)
    except CheckpointError:
        assume(False)
    assume(asked.embedding_sharding != "hidden" or config.hidden_size % asked.tp_size == 0)
    dtype = DTYPES[asked.dtype]
    precision = Precision(
        dtype=dtype,
        int8_layout="sm80" if asked.quant == "int8_wo" else None,
        smoothquant=SmoothQuantMode(asked.per_channel, asked.per_token) if asked.quant == "int8_sq" else None,
        int8_kv_cache=asked.kv_cache == "int8",
    )
    stages = [0] * asked.pp_size
    for rule in RuleBook(config, mapping, precision, embedding=SPLITS[asked.embedding_sharding]).rules(tied=False):
        stages[rule.stage] += sum(spec.nbytes for spec in rule.specs.values())
    assert [rank_weights(config, asked, dtype.itemsize, stage).total for stage in range(asked.pp_size)] == stages

"""Recipes for the tests: a plain one to change, and any that the schema accepts."""

from __future__ import annotations

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from pydantic import ValidationError

from trtqwen.hf.known import model_names
from trtqwen.recipe import Recipe


def make_recipe(model: str = "qwen2.5-7b", **sections: dict[str, Any]) -> Recipe:
    """Qwen2.5-7B in bfloat16 on one of four 4090D, with these changes by section."""
    return Recipe.model_validate(
        {
            "name": "mine",
            "description": "d",
            "model": model,
            "host": {"gpus": 4, **sections.get("host", {})},
            "checkpoint": {"dtype": "bfloat16", **sections.get("checkpoint", {})},
            "engine": {"backend": "tensorrt_llm", "max_seq_len": 32768, **sections.get("engine", {})},
            "serve": sections.get("serve", {}),
        }
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Over the whole schema: small and absurdly large values alike."""

    def size(*usual: int) -> int:
        return draw(st.one_of(st.sampled_from(usual), st.integers(1, 2**40)))

    torch = draw(st.booleans()) and draw(st.booleans())
    quant = draw(st.sampled_from(["none", "int8_wo", "int8_sq"]))
    kv_cache = draw(st.sampled_from(["auto", "auto", "int8"]))
    paged = draw(st.booleans()) and not (kv_cache == "int8" and not torch)
    chunked = paged and draw(st.booleans())
    batch, length = size(1, 8, 64, 2048), size(1, 2048, 32768, 32769, 131072)
    tokens_per_block = draw(st.sampled_from([8, 16, 32, 64, 128]))
    least = max(batch, tokens_per_block, 0 if chunked else length)
    gpus, tp, pp = (
        draw(st.integers(1, 8)),
        draw(st.sampled_from([1, 2, 3, 4, 8])),
        draw(st.sampled_from([1, 1, 2, 4])),
    )
    tp, pp = (tp, pp) if torch else (min(tp, gpus), pp if tp * pp <= gpus else 1)
    profiles = draw(st.booleans())
    content: dict[str, Any] = {
        "name": "any",
        "description": "d",
        "model": draw(st.sampled_from(model_names())),
        "host": None if torch else {"card": draw(st.sampled_from(["rtx-4090d", "rtx-4090"])), "gpus": gpus},
        "checkpoint": {
            "dtype": draw(st.sampled_from(["auto", "float16", "bfloat16"] + ["float32"] * (quant == "none"))),
            "tp_size": tp,
            "pp_size": pp,
            "quant": quant,
            "per_channel": quant == "int8_sq" and draw(st.booleans()),
            "per_token": quant == "int8_sq" and draw(st.booleans()),
            "kv_cache": kv_cache,
            "int8_layout": draw(st.sampled_from(["plain", "sm80", "sm90"])) if quant == "int8_wo" else "plain",
            "embedding_sharding": draw(st.sampled_from(["none", "vocab", "hidden"])),
            "yarn_factor": draw(st.sampled_from([None, None, 1.5, 2.0, 4.0, 32.0])),
            "release": draw(st.sampled_from(["0.18.2", "0.21.0", "1.2.1"])),
        },
        "engine": {
            "backend": "torch" if torch else "tensorrt_llm",
            "max_batch_size": batch,
            "max_num_tokens": least + draw(st.one_of(st.just(0), st.integers(0, 2**40))),
            "max_seq_len": length,
            "tokens_per_block": tokens_per_block,
            "use_paged_context_fmha": paged,
        },
        "serve": {
            "batch_scheduler_policy": draw(st.sampled_from(["guaranteed_no_evict", "max_utilization"])),
            "enable_chunked_context": chunked,
            "kv_cache_free_gpu_mem_fraction": draw(st.floats(1e-6, 0.999)),
            "max_tokens_in_paged_kv_cache": draw(st.one_of(st.none(), st.integers(tokens_per_block, 2**40))),
        },
    }
    if not torch:
        content["engine"] |= {
            "multiple_profiles": profiles,
            "opt_num_tokens": None if profiles else draw(st.sampled_from([None, 1])),
            "logits_dtype": draw(st.sampled_from(["float32", "float16"])),
            "gather_context_logits": draw(st.booleans()),
            "workers": size(1, 4),
        }
        content["serve"] |= {
            "replicas": draw(st.integers(1, gpus // (tp * pp))),
            "enable_kv_cache_reuse": paged and draw(st.booleans()),
            "enable_context_fmha_fp32_acc": draw(st.booleans()),
            "kv_cache_host_memory_bytes": size(1),
        }
    try:
        return Recipe.model_validate(content)
    except ValidationError:
        assume(False)
        raise

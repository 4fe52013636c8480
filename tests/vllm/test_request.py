"""Requests, options and recipes as vLLM takes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.models import TINY
from trtqwen.checkpoint.config import CheckpointConfig, checkpoint_config
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.demo import MODEL
from trtqwen.diagnostics import EngineError, RequestError, first_hint, first_problem
from trtqwen.engine.config import BuildConfig, EngineConfig
from trtqwen.executor.config import ExecutorConfig
from trtqwen.executor.request import Request
from trtqwen.facts.vllm import vllm_facts, vllm_image
from trtqwen.hf.config import HfConfig
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.recipe import Recipe, VllmSettings
from trtqwen.vllm.request import completion_body
from trtqwen.vllm.server import server_environment
from trtqwen.vllm.settings import command_line, cpu_cache_gib, memory_utilization, server_options

TOKENIZER = Tokenizer(MODEL)


def body(release: str = "0.32.0", **fields: Any) -> dict[str, Any]:
    request = Request(**{"id": "1", "input_token_ids": (1, 2), "max_tokens": 9, **fields})
    return completion_body(request, VllmSettings(), 10, vllm_facts(release), TOKENIZER)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}),
        ({"sampling": {"top_k": 1, "seed": 5}}, {"temperature": 0.0}),
        (
            {"sampling": {"top_p": 0.9, "temperature": 0.7, "seed": 2**64 - 1}},
            {"top_p": 0.9, "temperature": 0.7, "top_k": 0, "seed": -1},
        ),
        ({"sampling": {"top_k": 5}}, {"top_k": 5, "top_p": 1.0, "temperature": 1.0, "seed": 0}),
        ({"sampling": {"min_p": 0.1}}, {"min_p": 0.1}),
        ({"sampling": {"repetition_penalty": 1.2, "min_tokens": 20}}, {"repetition_penalty": 1.2, "min_tokens": 9}),
        ({"end_id": 3, "stop_words": ((4,), (5, 6))}, {"stop_token_ids": [3, 4]}),
        ({"embedding_bias": {7: 2.5, 8: -math.inf, 9: 1e4}}, {"logit_bias": {"7": 2.5, "8": -100, "9": 100}}),
        ({"bad_words": ((9,),)}, {"logit_bias": {"9": -100}}),
        ({"cache_salt": "a"}, {"cache_salt": "a"}),
        ({"output": {"return_log_probs": True}}, {"logprobs": 0}),
        (
            {"output": {"return_log_probs": True, "num_top_log_probs": 3}},
            {"logprobs": 3, "return_tokens_as_token_ids": True},
        ),
        ({"output": {"return_perf_metrics": True}}, {"stream_options": {"include_usage": True}}),
        ({"guided_decoding": {"guide_type": "json"}}, {"structured_outputs": {"json_object": True}}),
        (
            {"guided_decoding": {"guide_type": "json_schema", "guide": '{"type": "string"}'}},
            {"structured_outputs": {"json": {"type": "string"}}, "stop_token_ids": [TOKENIZER.end_id]},
        ),
        ({"guided_decoding": {"guide_type": "ebnf_grammar", "guide": "x"}}, {"structured_outputs": {"grammar": "x"}}),
    ],
)
def test_requests(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    made = body(**fields)
    assert made | expected == made
    assert set(made) <= vllm_facts("0.24.0").request_fields


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"output": {"return_context_logits": True}}, "return_context_logits"),
        ({"output": {"return_generation_logits": True}}, "return_generation_logits"),
        ({"sampling": {"presence_penalty": 3}}, "presence_penalty"),
        ({"sampling": {"top_p": 1.0, "temperature": 2.5}}, "temperature"),
        ({"guided_decoding": {"guide_type": "json_schema", "guide": "{"}}, "guided_decoding_guide"),
        ({"priority": 1}, "priority"),
        ({"input_token_ids": (1,) * 10}, "Prompt length (10)"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(fields: dict[str, Any], tensor: str) -> None:
    with pytest.raises(RequestError) as caught:
        body(**fields)
    assert caught.value.what.startswith(tensor)


def test_priorities_need_a_vllm_that_schedules_by_them() -> None:
    settings = VllmSettings(arguments={"scheduling-policy": "priority"})
    request = Request(id="1", input_token_ids=(1,), max_tokens=2, priority=-3)
    made = completion_body(request, settings, 10, vllm_facts("0.24.0"), TOKENIZER)
    assert made["priority"] == -3


def test_long_bad_words_need_a_newer_vllm() -> None:
    ids = TOKENIZER.encode("the end of it")
    assert len(ids) > 1
    assert body(bad_words=(tuple(ids),))["bad_words"] == ["the end of it"]
    with pytest.raises(RequestError, match=r"vLLM 0\.24\.0 cannot forbid"):
        body("0.24.0", bad_words=(tuple(ids),))


def engine(**changes: Any) -> EngineConfig:
    hf = HfConfig(model_type="qwen2", rms_norm_eps=1e-6, **TINY)
    content = checkpoint_config(
        hf,
        "bfloat16",
        RankMapping(2, 1),
        quantization={},
        embedding_sharding="none",
        calibrated=False,
        release="1.2.1",
    )
    limits = {"max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": 256, "tokens_per_block": 32}
    return EngineConfig(
        backend="vllm",
        vllm=VllmSettings(**changes),
        pretrained_config=CheckpointConfig.model_validate(content),
        build_config=BuildConfig(**limits),
    )


@pytest.mark.parametrize("release", ["0.24.0", "0.32.0"])
def test_options_are_the_recipes_and_known_to_each_release(release: str) -> None:
    config = engine(arguments={"enforce-eager": True, "seed": 3})
    options = server_options(
        config, ExecutorConfig(enable_kv_cache_reuse=True), gpu_bytes=24 * 2**30, weights_bytes=0
    )
    assert set(options) <= vllm_facts(release).flags
    words = command_line(options)
    for word in (
        *("--dtype=bfloat16", "--max-model-len=256", "--max-num-seqs=8", "--max-num-batched-tokens=256"),
        *("--block-size=32", "--tensor-parallel-size=2", "--enable-prefix-caching", "--enable-chunked-prefill"),
        *("--generation-config=vllm", "--enforce-eager", "--seed=3", "--gpu-memory-utilization=0.900"),
    ):
        assert word in words
    assert not any(word.startswith("--num-gpu-blocks-override") for word in words)
    off = command_line(server_options(config, ExecutorConfig(max_tokens_in_paged_kv_cache=640)))
    assert "--no-enable-prefix-caching" in off
    assert "--num-gpu-blocks-override=21" in off


def test_memory_means_what_tensorrt_llm_means() -> None:
    """The cache gets its share of what the weights leave; vLLM counts both."""
    assert memory_utilization(ExecutorConfig(kv_cache_free_gpu_mem_fraction=0.5), 100, 40) == pytest.approx(0.7)
    assert cpu_cache_gib(engine(), ExecutorConfig(max_tokens_in_paged_kv_cache=2**20)) == 1
    small = engine()
    odd = small.model_copy(update={"build_config": small.build_config.model_copy(update={"tokens_per_block": 16})})
    with pytest.raises(EngineError, match="multiples of 32"):
        server_options(odd, ExecutorConfig())


def test_the_environment_is_vllms_own() -> None:
    given = {"PYTHONPATH": "/a", "LD_LIBRARY_PATH": "/x/pytriton/lib:/cuda/lib", "PATH": "/bin"}
    made = server_environment(given, {"VLLM_CPU_KVCACHE_SPACE": "3"})
    assert "PYTHONPATH" not in made
    assert made["LD_LIBRARY_PATH"] == "/cuda/lib"
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert Path(made["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(Path.home())
    assert server_environment({"TORCHINDUCTOR_CACHE_DIR": "/c"}, {})["TORCHINDUCTOR_CACHE_DIR"] == "/c"


def recipe(**changes: Any) -> Recipe:
    sections: dict[str, Any] = {"engine": {"backend": "vllm"}, "checkpoint": {}, "serve": {}}
    for section, fields in changes.items():
        sections[section] |= fields
    return Recipe.model_validate({"name": "r", "description": "d", **sections})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"vllm": {"arguments": {"enforce-eagre": True}}}}, "did you mean 'enforce-eager'"),
        ({"engine": {"vllm": {"arguments": {"dtype": "half"}}}}, "trtqwen sets dtype"),
        ({"engine": {"vllm": {"python": "p", "address": "http://a:1"}}}, "exclude each other"),
        ({"engine": {"tokens_per_block": 8}}, "tokens_per_block 8"),
        ({"engine": {"gather_context_logits": True}}, "gather_context_logits"),
        ({"checkpoint": {"kv_cache": "int8"}}, "checkpoint.kv_cache int8"),
        ({"serve": {"batch_scheduler_policy": "guaranteed_no_evict"}}, "max_utilization"),
        ({"serve": {"kv_cache_host_memory_bytes": 5}}, "kv_cache_host_memory_bytes"),
    ],
)
def test_recipes_without_a_counterpart_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(**changes)
    assert message in f"{first_problem(caught.value)}; {first_hint(caught.value)}"
    assert recipe().engine.backend == "vllm"


def test_images() -> None:
    assert vllm_image("0.24.0").image.endswith(":26.07-vllm-python-py3")
    assert vllm_image("0.23.0").vllm == "0.22.1"
    assert vllm_facts("0.99.0").release == "0.32.0"
    assert vllm_facts("0.20.0").release == "0.24.0"

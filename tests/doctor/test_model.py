"""Model directories as they are downloaded, mixed up and mended by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.doctor.conftest import check, trtllm_engine
from trtqwen.demo import MODEL
from trtqwen.doctor.check import Result
from trtqwen.doctor.subject import Subject
from trtqwen.recipe import Recipe, load_recipe
from trtqwen.system.host import Host

HfDirectory = Callable[..., Path]
CHECKS = ("D10", "D11", "D12", "D13", "D14", "D16")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def recipe(name: str = "qwen2.5-7b-fp16-tp4-4090d", **checkpoint: Any) -> Recipe:
    loaded = load_recipe(name)
    return loaded.model_copy(update={"checkpoint": loaded.checkpoint.model_copy(update=checkpoint)})


def examined(name: str, model: Path | None, given: Recipe | None = None) -> Result:
    return check(name, Subject(Host(), recipe=given, model=model))


@pytest.mark.parametrize("name", CHECKS)
def test_the_bundled_model_is_well(name: str) -> None:
    assert examined(name, MODEL).verdict == "ok"


@pytest.mark.parametrize("name", [*CHECKS, "D09", "D28"])
def test_no_model_is_a_skip(name: str) -> None:
    assert examined(name, None).verdict == "skip"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["QWenLMHeadModel"], "model_type": "qwen"}, "QWenLMHeadModel"),
        ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, "Qwen2MoeForCausalLM"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "Qwen2VL"),
        ({"model_type": "qwen2_moe"}, 'model_type is "qwen2_moe"'),
        ({"quantization_config": {"quant_method": "gptq"}}, "use the 16-bit original"),
    ],
)
def test_other_families_are_refused(copy: Path, changes: dict[str, Any], says: str) -> None:
    edit(copy / "config.json", **changes)
    result = examined("D10", copy)
    assert result.verdict == "fail"
    assert says in f"{result.evidence} {result.hint}"
    assert "see D10" in examined("D14", copy).evidence


def test_a_model_cut_short_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert examined("D10", copy).verdict == "fail"


@pytest.mark.parametrize(
    ("model", "tp_size", "verdict", "says"),
    [
        ("qwen2.5-0.5b", 4, "fail", "use tp_size 1, 2"),
        ("qwen2.5-1.5b", 4, "ok", "each KV head on 2 ranks"),
        ("qwen2.5-7b", 8, "fail", "does not divide the attention heads"),
        ("qwen2.5-7b", 4, "ok", "28 heads, 4 KV heads"),
    ],
)
def test_divisibility_by_published_sizes(model: str, tp_size: int, verdict: str, says: str) -> None:
    given = recipe(tp_size=tp_size).model_copy(update={"model": model})
    result = examined("D11", None, given)
    assert result.verdict == verdict
    assert says in f"{result.evidence} {result.hint}"


def test_legal_sizes_are_told_without_a_recipe(hf_directory: HfDirectory) -> None:
    assert examined("D11", hf_directory(num_attention_heads=6, num_key_value_heads=2, hidden_size=96)).evidence == (
        "6 heads, 2 KV heads: tp_size 1, 2"
    )


@pytest.mark.parametrize(
    ("generation", "tokenizer", "config", "verdict", "says"),
    [
        ({}, {}, {}, "ok", "end ids 4095, 4093"),
        # one of the files of a base model among those of an Instruct one, which samples
        (
            {"eos_token_id": 4093},
            {"eos_token": "<|endoftext|>"},
            {"eos_token_id": 4093},
            "fail",
            "(4095), which ends no answer",
        ),
        (
            {"eos_token_id": 4093, "do_sample": False},
            {"eos_token": "<|endoftext|>"},
            {"eos_token_id": 4093},
            "warn",
            "do not serve it as chat",
        ),
        ({"eos_token_id": [151645, 151643]}, {}, {}, "fail", "end ids 151645, 151643 are beyond the 4096 rows"),
        ({"eos_token_id": None}, {}, {}, "ok", "generation_config.json none"),
    ],
)
def test_end_ids(
    copy: Path,
    generation: dict[str, Any],
    tokenizer: dict[str, Any],
    config: dict[str, Any],
    verdict: str,
    says: str,
) -> None:
    edit(copy / "generation_config.json", **generation)
    edit(copy / "tokenizer_config.json", **tokenizer)
    edit(copy / "config.json", **config)
    result = examined("D12", copy)
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


def template(path: Path, change: Callable[[str], str | None]) -> None:
    edit(path, chat_template=change(json.loads(path.read_text("utf-8"))["chat_template"]))


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        (lambda text: None, "warn", "no chat template"),
        (lambda text: "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "ok", "a turn of"),
        (lambda text: text.replace("<|im_end|>", "<|im_stop|>"), "warn", "<|im_stop|>"),
        (lambda text: "{{ raise_exception('no system role') }}", "fail", "no system role"),
        (lambda text: "{% if x %}", "fail", "broken"),
    ],
)
def test_chat_templates(copy: Path, change: Callable[[str], str | None], verdict: str, says: str) -> None:
    template(copy / "tokenizer_config.json", change)
    result = examined("D13", copy)
    assert result.verdict == verdict, result
    assert says in result.evidence


def test_turn_marks_that_are_no_tokens(copy: Path) -> None:
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_start|>"]
    path.write_text(json.dumps(content))
    assert "'<|im_start|>' is declared as id 4094" in examined("D12", copy).evidence


@pytest.fixture
def biased(hf_directory: HfDirectory) -> Path:
    """A model whose first layer has Qwen2.5-7B's trouble: a k_proj bias many times the others'."""
    directory = hf_directory(num_hidden_layers=4)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.bias"] *= 30
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_huge_bias_forbids_8_bit_kv_caches_only(biased: Path, tmp_path: Path) -> None:
    assert examined("D14", biased).verdict == "ok"
    assert "leave the KV cache in 16 bit" in examined("D14", biased).evidence
    refused = examined("D14", biased, recipe(kv_cache="int8"))
    assert refused.verdict == "fail"
    assert "(layer 0)" in refused.evidence
    assert examined("D14", MODEL, recipe(kv_cache="int8")).verdict == "ok"
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    engine = trtllm_engine(tmp_path / "engine", pretrained_config__quantization=quantization)
    result = check("D14", Subject(Host(), model=biased, engine=engine))
    assert (result.verdict, "the engine's KV cache is FP8" in result.evidence) == ("fail", True)


@pytest.mark.parametrize(
    ("dtype", "accumulate", "verdict", "says"),
    [
        ("bfloat16", True, "ok", "recipe bfloat16"),
        ("auto", True, "ok", ""),
        ("float16", True, "warn", "trtqwen verify"),
        ("float16", False, "warn", "enable_context_fmha_fp32_acc"),
    ],
)
def test_float16_from_bfloat16(dtype: str, accumulate: bool, verdict: str, says: str) -> None:
    given = recipe(dtype=dtype)
    given = given.model_copy(
        update={"serve": given.serve.model_copy(update={"enable_context_fmha_fp32_acc": accumulate})}
    )
    result = examined("D15", None, given)
    assert result.verdict == verdict
    assert says in f"{result.evidence} {result.hint}"


@pytest.mark.parametrize(
    ("tied", "head", "verdict", "says"),
    [
        (True, "none", "ok", "tied"),
        (True, "same", "ok", "tied"),
        (True, "other", "fail", "lm_head.weight differs from the embedding"),
        (False, "other", "ok", "untied, padded by 1"),
        (False, "none", "fail", "tensor 'lm_head.weight' is missing"),
    ],
)
def test_lm_heads(hf_directory: HfDirectory, tied: bool, head: str, verdict: str, says: str) -> None:
    directory = hf_directory()
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    embedding = tensors["model.embed_tokens.weight"]
    tensors |= {"same": {"lm_head.weight": embedding.copy()}, "other": {"lm_head.weight": embedding + 1}, "none": {}}[
        head
    ]
    save_file(tensors, directory / "model.safetensors")
    edit(directory / "config.json", tie_word_embeddings=tied)
    result = examined("D10" if verdict == "fail" else "D16", directory, recipe())
    assert result.verdict == verdict, result
    assert says in result.evidence


def test_vocabulary_of_another_model(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.ascontiguousarray(tensors[name][:4000])
    save_file(tensors, copy / "model.safetensors")
    assert "has shape [4000, 256], but config.json makes it [4096, 256]" in examined("D10", copy).evidence
    edit(copy / "config.json", vocab_size=4000)
    assert "the tokenizer has 4096 tokens, the model 4000 rows" in examined("D16", copy).evidence

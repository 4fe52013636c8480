from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtqwen.diagnostics import SourceError
from trtqwen.hf.config import load_config, stretched

GOOD: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**GOOD, **changes}))
    return directory


def test_the_fields_of_qwen2_5_0_5b(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config.head_size == 64
    assert (config.rope_theta, config.tie_word_embeddings, config.torch_dtype) == (1000000.0, True, "bfloat16")


def test_what_transformers_5_writes_means_the_same(tmp_path: Path) -> None:
    new = {k: v for k, v in GOOD.items() if k not in ("rope_theta", "torch_dtype")}
    new |= {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    (tmp_path / "config.json").write_text(json.dumps(new))
    old = tmp_path / "old"
    old.mkdir()
    assert load_config(tmp_path) == load_config(write(old))


def test_rope_scaling_carries_both_spellings_of_its_type(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert load_config(write(tmp_path, rope_scaling=yarn)).rope_scaling == {"rope_type": "yarn", **yarn}


@pytest.mark.parametrize("positions", [32768, 131072])  # of the card's example, untouched and raised by hand
def test_stretching_gives_what_qwens_cards_tell_users_to_write(tmp_path: Path, positions: int) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    by_hand = load_config(write(tmp_path, rope_scaling=yarn, max_position_embeddings=positions))
    (tmp_path / "plain").mkdir()
    plain = load_config(write(tmp_path / "plain"))
    assert stretched(plain, 4.0) == by_hand
    assert stretched(by_hand, 4.0) == by_hand
    assert (by_hand.context, by_hand.native_context) == (131072, 32768)


def test_a_scaling_is_not_stretched_again(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    with pytest.raises(SourceError, match="has a rope_scaling of its own"):
        stretched(load_config(write(tmp_path, rope_scaling=yarn)), 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is LlamaForCausalLM"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "architectures is Qwen2MoeForCausalLM"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "architectures is Qwen2VLForConditionalGeneration"),
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "use a model of Qwen2ForCausalLM .dense"),
        ({"architectures": 3}, "architectures is 3"),
        ({"quantization_config": "fp8"}, "quantized already .quant_method fp8"),
        ({"num_hidden_layers": 10**30}, "field 'num_hidden_layers'"),
        ({"hidden_size": 10**30}, "field 'hidden_size'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already .quant_method gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already .quant_method awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already .quant_method fp8"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window"),
        ({"hidden_size": 0}, "field 'hidden_size'"),
        ({"hidden_size": "many"}, "field 'hidden_size'"),
        ({"vocab_size": None}, "field 'vocab_size'"),
    ],
)
def test_other_models_are_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        load_config(write(tmp_path, **changes))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory"):
        load_config(tmp_path / "none")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match="is not a JSON object"):
        load_config(tmp_path)


def test_a_null_is_what_transformers_takes_it_for(tmp_path: Path) -> None:
    nulls = ("head_dim", "rope_scaling", "sliding_window", "quantization_config", "layer_types", "eos_token_id")
    assert load_config(write(tmp_path, **dict.fromkeys(nulls))) == load_config(write(tmp_path))
    assert load_config(write(tmp_path, num_key_value_heads=None)).num_key_value_heads == GOOD["num_attention_heads"]
    assert load_config(write(tmp_path, eos_token_id=[7, None])).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rope_theta": 1e6, "rope_theta": 1e4}', "gives 'rope_theta' twice"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ("<!DOCTYPE html><html>", "is a web page"),
        ("", "is empty"),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (("adapter_config.json",), "LoRA adapter", "merge_and_unload"),
        (("model.gguf",), "GGUF", "safetensors"),
        (("snapshots/abc/config.json",), "cache entry", "snapshots/abc"),
        (("models--a--b/snapshots/c/config.json",), "Hugging Face cache", "models--a--b/snapshots"),
        (("checkpoint-500/config.json",), "checkpoint-500 in it has", "checkpoint-500"),
        (("a/config.json", "b/config.json"), "several models", "one of them"),
        (("zero_to_fp32.py",), "ZeRO", "zero_to_fp32"),
        (("__0_0.distcp",), "FSDP", "accelerate merge-weights"),
        (("quantize_config.json", "config.json"), "quantized already", "16-bit"),
        (("adapter_config.json", "model.safetensors", "config.json"), "next to a model's weights", "move"),
    ],
)
def test_directories_of_another_kind_are_named(
    tmp_path: Path, files: tuple[str, ...], message: str, hint: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(SourceError) as caught:
        load_config(tmp_path)
    assert message in caught.value.what
    assert hint in caught.value.hint

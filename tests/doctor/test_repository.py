"""Repositories as fill_template leaves them, and our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from tests.doctor.conftest import check, trtllm_engine, write
from trtqwen.diagnostics import InputError
from trtqwen.doctor.check import Result
from trtqwen.doctor.configs import read_model_files
from trtqwen.doctor.subject import Subject, completed
from trtqwen.recipe import ServeRecipe
from trtqwen.system.host import Host
from trtqwen.triton.repository import write_repository

Filled = Callable[..., Path]


def examined(repository: Path, name: str = "D22") -> Result:
    return check(name, completed(Subject(Host(), repository=repository)))


@pytest.fixture
def ours(bundled_engine: Callable[..., Path], tmp_path: Path) -> Path:
    write_repository(bundled_engine(), ServeRecipe(max_queue_size=32), tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("name", ["D22", "D23", "D24"])
def test_good_repositories(ours: Path, filled: Filled, name: str) -> None:
    assert examined(ours, name).verdict == "ok", examined(ours, name)
    assert examined(filled(), name).verdict == "ok", examined(filled(), name)
    assert check(name, Subject(Host())).verdict == "skip"


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text("utf-8").splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("variable", "model", "key", "bare"),
    [
        ("prompt_embedding_table_data_type", "tensorrt_llm", "data_type", True),  # undocumented upstream
        ("triton_max_batch_size", "preprocessing", "max_batch_size", True),
        ("decoupled_mode", "tensorrt_llm", "decoupled", True),
        ("preferred_batch_size", "tensorrt_llm", "preferred_batch_size", True),
        ("max_queue_size", "tensorrt_llm", "max_queue_size", True),
        ("triton_backend", "tensorrt_llm", "backend", False),
        ("batching_strategy", "tensorrt_llm", "gpt_model_type", False),
        ("engine_dir", "tensorrt_llm", "gpt_model_path", False),
        ("tokenizer_dir", "postprocessing", "tokenizer_dir", False),
    ],
)
def test_a_forgotten_variable_is_named_with_its_place(
    filled: Filled, variable: str, model: str, key: str, bare: bool
) -> None:
    repository = filled(**{variable: None})
    path = repository / model / "config.pbtxt"
    result = examined(repository)
    assert result.verdict == "fail"
    kind = "bare" if bare else "quoted"
    assert f"{path}:{line_of(path, f'${{{variable}}}')}: {key} is still ${{{variable}}}, {kind}" in result.evidence
    assert f"fill {variable}" in result.hint.splitlines()
    assert "Couldn't parse" not in result.evidence  # one cause, one line
    if bare:
        with pytest.raises(text_format.ParseError):
            text_format.Parse(path.read_text("utf-8"), ModelConfig())
    else:
        assert text_format.Parse(path.read_text("utf-8"), ModelConfig())


def test_optional_variables_may_stay_and_are_told(filled: Filled) -> None:
    result = examined(filled(gpu_device_ids=None, guided_decoding_backend=None))
    assert result.verdict == "warn"
    assert "gpu_device_ids (line" in result.evidence
    assert "takes them for unset" in result.evidence or "take them for unset" in result.evidence


def test_syntax_errors_have_line_and_column(filled: Filled) -> None:
    repository = filled()
    path = repository / "ensemble" / "config.pbtxt"
    path.write_text(path.read_text("utf-8").replace("max_batch_size: 64", "max_batch_size: sixty"))
    line = line_of(path, "sixty")
    result = examined(repository)
    assert f"{path}: line {line}:17" in result.evidence
    assert result.verdict == "fail"


@pytest.mark.parametrize(
    ("variables", "verdict", "says"),
    [
        ({"bls_decoupled": "False"}, "fail", "decoupled differs: tensorrt_llm true, tensorrt_llm_bls false"),
        ({"bls_decoupled": "False", "decoupled_mode": "False"}, "warn", "requests cannot stream"),
        ({"ensemble_logits": "TYPE_FP16"}, "fail", "TYPE_FP16 in ensemble/generation_logits"),
        ({"logits_datatype": "TYPE_FP16", "ensemble_logits": "TYPE_FP16"}, "fail", "TYPE_FP32 in the engine"),
        ({"batching": "dynamic_batching { }"}, "fail", "preserve_ordering: true"),
        ({"batching": "", "instances": "4"}, "fail", "overtake each other"),
        ({"batching": ""}, "ok", ""),
        ({"preferred_batch_size": "128"}, "fail", "preferred_batch_size 128 is not in 1 to 64"),
        ({"engine_dir": "/nowhere/engine"}, "fail", "gpt_model_path /nowhere/engine is not a directory"),
        ({"engine_dir": ""}, "fail", "gpt_model_path is empty"),  # parse_error.101 in Triton's log
        ({"batching_strategy": "inflight"}, "fail", "set it to inflight_fused_batching"),
        ({"tokenizer_dir": "Qwen/Qwen2.5-7B-Instruct"}, "warn", "will be downloaded at every start"),
        ({"tokenizer_dir": "/models/gone"}, "fail", "tokenizer_dir /models/gone is not a directory"),
        ({"exclude_input_in_output": ""}, "warn", "begin with the prompt"),
        ({"batch_scheduler_policy": "max_utilisation"}, "warn", "guaranteed_no_evict is taken"),
        ({"gpu_device_ids": "0,1"}, "fail", "names 2 GPUs for 4 ranks"),
        ({"gpu_device_ids": "0,1,2,3"}, "ok", ""),
        ({"step": "tensorrt_llm_2"}, "fail", "step 'tensorrt_llm_2' is no model"),
    ],
)
def test_settings_that_do_not_go_together(filled: Filled, variables: dict[str, str], verdict: str, says: str) -> None:
    result = examined(filled(**variables))
    assert result.verdict == verdict, result
    assert says in f"{result.evidence} {result.hint}"


def remove_rank(repository: Path, engine: Path) -> None:
    (engine / "rank3.engine").unlink()


def add_rank(repository: Path, engine: Path) -> None:
    (engine / "rank4.engine").touch()


def remove_engine_config(repository: Path, engine: Path) -> None:
    (engine / "config.json").unlink()


def rename(repository: Path, engine: Path) -> None:
    (repository / "preprocessing").rename(repository / "preprocess")


def empty_engine_config(repository: Path, engine: Path) -> None:
    config = json.loads((engine / "config.json").read_text())
    (engine / "config.json").write_text(json.dumps(config | {"pretrained_config": None}))


def remove_version(repository: Path, engine: Path) -> None:
    shutil.rmtree(repository / "tensorrt_llm" / "1")


def remove_model(repository: Path, engine: Path) -> None:
    (repository / "postprocessing/1/model.py").unlink()


def empty_tokenizer(repository: Path, engine: Path) -> None:
    (engine.parent / "tokenizer/tokenizer_config.json").unlink()


def change_batch(repository: Path, engine: Path) -> None:
    path = repository / "preprocessing/config.pbtxt"
    path.write_text(path.read_text("utf-8").replace("max_batch_size: 64", "max_batch_size: 32"))


@pytest.mark.parametrize(
    ("breaks", "verdict", "says"),
    [
        (remove_rank, "fail", "rank3.engine missing, the engine has 4 ranks"),
        (add_rank, "warn", "an older build's"),
        (remove_engine_config, "fail", "config.json: is missing"),
        (empty_engine_config, "fail", "config.json: is not the config of a trtqwen engine"),
        (rename, "fail", "name is 'preprocessing', the directory 'preprocess'"),
        (remove_version, "fail", "has no version directory"),
        (remove_model, "fail", "has no model.py"),
        (empty_tokenizer, "fail", "has no tokenizer_config.json"),
        (change_batch, "fail", "max_batch_size differs: ensemble 64, postprocessing 64, preprocessing 32"),
    ],
)
def test_files_that_went_missing(
    filled: Filled, tmp_path: Path, breaks: Callable[[Path, Path], None], verdict: str, says: str
) -> None:
    repository = filled()
    breaks(repository, tmp_path / "engine")
    result = examined(repository)
    assert result.verdict == verdict, result
    assert says in result.evidence


def test_a_directory_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a Triton model repository"):
        read_model_files(tmp_path)
    assert examined(tmp_path).verdict == "fail"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"max_queue_delay_microseconds": "1000000"}, "max_queue_delay_microseconds 1000000"),
        ({"max_queue_size": "0"}, "queue without end"),
        ({"bls_instance_count": "1"}, "1 instances for an engine of max_batch_size 64"),
    ],
)
def test_queues(filled: Filled, variables: dict[str, str], says: str) -> None:
    result = examined(filled(**variables), "D23")
    assert (result.verdict, says in result.evidence) == ("warn", True), result


@pytest.mark.parametrize(
    ("vocabulary", "variables", "says"),
    [
        (152064, {"guided_decoding_backend": "xgrammar"}, ""),
        (151665, {"guided_decoding_backend": "xgrammar"}, "151665 entries, the engine 152064"),
        (None, {"guided_decoding_backend": "xgrammar"}, "cannot be read"),
        (152064, {"guided_decoding_backend": "outlines"}, "will not load"),
        (None, {"guided_decoding_backend": "xgrammar", "triton_backend": "python"}, ""),
        (
            None,
            {"guided_decoding_backend": "xgrammar", "triton_backend": "python", "tokenizer_dir": ""},
            "needs tokenizer_dir",
        ),
    ],
)
def test_guided_decoding(
    filled: Filled, tmp_path: Path, vocabulary: int | None, variables: dict[str, str], says: str
) -> None:
    info = tmp_path / "info.json"
    if vocabulary is not None:
        write(tmp_path, {"info.json": json.dumps({"encoded_vocab": ["a"] * vocabulary})})
    result = examined(filled(xgrammar_tokenizer_info_path=str(info), **variables), "D24")
    assert result.verdict == ("warn" if says else "ok"), result
    assert says in result.evidence


@pytest.mark.parametrize(
    ("variables", "engine", "verdict", "says"),
    [
        ({}, {}, "ok", "use_paged_context_fmha on"),
        ({}, {"build_config__plugin_config": {"tokens_per_block": 32, "use_paged_context_fmha": False}}, "fail", ""),
        (
            {"enable_chunked_context": "False", "enable_kv_cache_reuse": ""},  # unset is on in the C++ backend
            {"build_config__plugin_config": {"tokens_per_block": 32, "use_paged_context_fmha": False}},
            "fail",
            "enable_kv_cache_reuse: the engine has no use_paged_context_fmha",
        ),
        ({"enable_chunked_context": ""}, {}, "fail", "prompts over 8,192 tokens will be refused"),
        ({"enable_chunked_context": ""}, {"build_config__max_num_tokens": 32768}, "ok", ""),
    ],
)
def test_repository_against_engine(
    filled: Filled, tmp_path: Path, variables: dict[str, str], engine: dict[str, Any], verdict: str, says: str
) -> None:
    repository = filled(trtllm_engine(tmp_path / "engine", **engine), **variables)
    result = examined(repository, "D18")
    assert result.verdict == verdict, result
    assert says in result.evidence


def test_a_torch_engine_conflicts_with_nothing(ours: Path) -> None:
    assert examined(ours, "D18").verdict == "ok"

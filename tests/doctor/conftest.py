"""Machines and repositories to examine: directories that stand in for a root, and what fill_template leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import pytest

from trtqwen.doctor.check import Result
from trtqwen.doctor.run import CHECKS, run_check
from trtqwen.doctor.subject import Subject, System
from trtqwen.system.host import Gpu, Host

GIB = 2**30
FOUR = tuple(Gpu(index, "NVIDIA GeForce RTX 4090 D", "8.9", 24564, 12) for index in range(4))
IN_IMAGE = Host(
    tensorrt_llm="1.2.1",
    tensorrt="10.14.1.48",
    trtllm_build=Path("/usr/local/bin/trtllm-build"),
    driver="590.44.01",
    gpus=FOUR,
    image="nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3",
)


def check(name: str, subject: Subject) -> Result:
    """What one check says, as `examine` would tell it."""
    return run_check(next(check for check in CHECKS if check.id == name), subject)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def limits_text(memlock: str, stack: str) -> str:
    """/proc/self/limits, as far as it matters."""
    return f"Max locked memory    {memlock:9} {memlock:9} bytes\nMax stack size       {stack:9} {stack:9} bytes\n"


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., System]:
    """Makes a root directory with these files, and programs that print these texts; `shm` and `disk` in GiB."""

    def make(
        files: dict[str, str] | None = None,
        programs: dict[str, str] | None = None,
        environ: dict[str, str] | None = None,
        shm: float = 16,
        disk: float = 500,
    ) -> System:
        root, programs_directory = tmp_path / "root", tmp_path / "bin"
        (root / "dev/shm").mkdir(parents=True)
        programs_directory.mkdir()
        limits = limits_text("unlimited", "67108864")
        write(root, {"proc/meminfo": "MemAvailable:   67108864 kB\n", "proc/self/limits": limits} | (files or {}))
        for name, output in (programs or {}).items():
            program = programs_directory / name
            program.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\n")
            program.chmod(0o755)

        def disk_usage(path: Path) -> tuple[int, int, int]:
            size = int((shm if path == root / "dev/shm" else disk) * GIB)
            return size, 0, size

        return System(root, {"PATH": str(programs_directory)} | (environ or {}), tmp_path, disk_usage)

    return make


PYTHON_MODEL = """\
name: "$name"
backend: "python"
max_batch_size: ${triton_max_batch_size}
input [ { name: "$input" data_type: TYPE_STRING dims: [ 1 ] } ]
parameters {
  key: "tokenizer_dir"
  value: { string_value: "${tokenizer_dir}" }
}
parameters {
  key: "add_special_tokens"
  value: { string_value: "${add_special_tokens}" }
}
$batching
instance_group [ { count: ${instances} kind: KIND_CPU } ]
"""
ENGINE_MODEL = """\
# as upstream's tools/fill_template.py leaves it, tensors shortened; ${this} is no placeholder
name: "tensorrt_llm"
backend: "${triton_backend}"
max_batch_size: ${triton_max_batch_size}
model_transaction_policy { decoupled: ${decoupled_mode} }
dynamic_batching {
  preferred_batch_size: [ ${preferred_batch_size} ]
  max_queue_delay_microseconds: ${max_queue_delay_microseconds}
  default_queue_policy: { max_queue_size: ${max_queue_size} }
}
input [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "draft_logits" data_type: ${logits_datatype} dims: [ -1, -1 ] },
  {
    name: "prompt_embedding_table"
    data_type: ${prompt_embedding_table_data_type}
    dims: [ -1, -1 ]
  }
]
output [ { name: "generation_logits" data_type: ${logits_datatype} dims: [ -1, -1, -1 ] } ]
instance_group [ { count: 1 kind : KIND_CPU } ]
$parameters
"""
ENSEMBLE = """\
name: "ensemble"
platform: "ensemble"
max_batch_size: ${triton_max_batch_size}
output [ { name: "generation_logits" data_type: ${ensemble_logits} dims: [ -1, -1, -1 ] } ]
ensemble_scheduling { step [ { model_name: "preprocessing" }, { model_name: "${step}" } ] }
"""
BLS = """\
name: "tensorrt_llm_bls"
backend: "python"
max_batch_size: ${triton_max_batch_size}
model_transaction_policy { decoupled: ${bls_decoupled} }
instance_group [ { count: ${bls_instance_count} kind: KIND_CPU } ]
"""
PARAMETERS = {
    "gpt_model_type": "batching_strategy",
    "gpt_model_path": "engine_dir",
    "batch_scheduler_policy": "batch_scheduler_policy",
    "exclude_input_in_output": "exclude_input_in_output",
    "enable_kv_cache_reuse": "enable_kv_cache_reuse",
    "enable_chunked_context": "enable_chunked_context",
    "gpu_device_ids": "gpu_device_ids",
    "tokenizer_dir": "tokenizer_dir",
    "guided_decoding_backend": "guided_decoding_backend",
    "xgrammar_tokenizer_info_path": "xgrammar_tokenizer_info_path",
}
FILLED = {
    "triton_backend": "tensorrtllm",
    "triton_max_batch_size": "64",
    "preferred_batch_size": "64",
    "decoupled_mode": "True",
    "bls_decoupled": "True",
    "max_queue_delay_microseconds": "0",
    "max_queue_size": "128",
    "logits_datatype": "TYPE_FP32",
    "ensemble_logits": "TYPE_FP32",
    "prompt_embedding_table_data_type": "TYPE_FP16",
    "batching_strategy": "inflight_fused_batching",
    "batch_scheduler_policy": "guaranteed_no_evict",
    "exclude_input_in_output": "True",
    "enable_kv_cache_reuse": "False",
    "enable_chunked_context": "True",
    "gpu_device_ids": "",
    "guided_decoding_backend": "",
    "xgrammar_tokenizer_info_path": "",
    "add_special_tokens": "False",
    "instances": "1",
    "bls_instance_count": "64",
    "batching": "dynamic_batching { preserve_ordering: true }",
    "step": "tensorrt_llm",
}


def trtllm_engine(directory: Path, tp_size: int = 4, **changes: Any) -> Path:
    """An engine directory of the form that trtllm-build writes; changes by dotted path into config.json."""
    config: dict[str, Any] = {
        "version": "1.2.1",
        "pretrained_config": {
            "architecture": "Qwen2ForCausalLM",
            "dtype": "bfloat16",
            "logits_dtype": "float32",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "head_size": 128,
            "max_position_embeddings": 32768,
            "norm_epsilon": 1e-6,
            "rotary_base": 1000000.0,
            "rotary_scaling": None,
            "hidden_act": "silu",
            "use_parallel_embedding": False,
            "embedding_sharding_dim": 0,
            "mapping": {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1},
            "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        },
        "build_config": {
            "max_batch_size": 64,
            "max_num_tokens": 8192,
            "max_seq_len": 32768,
            "plugin_config": {"tokens_per_block": 32, "use_paged_context_fmha": True},
        },
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    write(directory, {"config.json": json.dumps(config)})
    for rank in range(tp_size):
        (directory / f"rank{rank}.engine").touch()
    return directory


@pytest.fixture
def filled(tmp_path: Path) -> Callable[..., Path]:
    """Fills the templates as fill_template does: a variable given as None stays a placeholder."""

    def make(engine: Path | None = None, bls: bool = True, **variables: str | None) -> Path:
        repository = tmp_path / "repository"
        shutil.rmtree(repository, ignore_errors=True)
        tokenizer = tmp_path / "tokenizer"
        write(tokenizer, {"tokenizer_config.json": "{}"})
        values = FILLED | {
            "engine_dir": str(engine or trtllm_engine(tmp_path / "engine")),
            "tokenizer_dir": str(tokenizer),
        }
        given = {name: value for name, value in (values | variables).items() if value is not None}
        parameters = "\n".join(
            f'parameters: {{\n  key: "{key}"\n  value: {{\n    string_value: "${{{variable}}}"\n  }}\n}}'
            for key, variable in PARAMETERS.items()
        )
        texts = {
            "preprocessing": Template(PYTHON_MODEL).safe_substitute(name="preprocessing", input="QUERY", batching=""),
            "postprocessing": Template(PYTHON_MODEL).safe_substitute(name="postprocessing", input="TOKENS_BATCH"),
            "tensorrt_llm": ENGINE_MODEL.replace("$parameters", parameters),
            "ensemble": ENSEMBLE,
        } | ({"tensorrt_llm_bls": BLS} if bls else {})
        for name, text in texts.items():
            write(
                repository, {f"{name}/config.pbtxt": Template(text).safe_substitute(given), f"{name}/1/model.py": ""}
            )
        return repository

    return make

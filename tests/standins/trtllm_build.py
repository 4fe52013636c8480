"""A program that behaves as `trtllm-build` of a release does, by the reference's tables and not by trtqwen's.

It takes exactly the release's flags, reads the checkpoint, applies the builder's silent changes and writes an engine
directory of the documented form. `STANDIN_FAIL` makes it fail in one of the documented ways, with the text of
the real log. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

TABLE = json.loads((Path(__file__).parents[1] / "data" / "trtllm_build_flags.json").read_text())
FP8_WEIGHTS = ("FP8", "W4A8_AWQ", "NVFP4")
SMOOTH_FUSED = ("LlamaForCausalLM", "Gemma2ForCausalLM", "MedusaForCausalLM")
TYPES: dict[str, Any] = {"int": int, "str": str, "enum": str, "str list": str}
STAMP = "[11/22/2026-10:00:00]"


def log(text: str, who: str = "TRT-LLM", level: str = "I") -> None:
    print(f"{STAMP} [{who}] [{level}] {text}", flush=True)


def has(flag: dict[str, Any], release: str) -> bool:
    last = (1, 0) if flag["available"].startswith("<=1.0") else (1, 2)
    return (0, 18) <= tuple(map(int, release.split(".")[:2])) <= last


def parser(release: str) -> argparse.ArgumentParser:
    """The command line of a release."""
    result = argparse.ArgumentParser("trtllm-build", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for flag in TABLE["flags"]:
        if not has(flag, release):
            continue
        names = [flag["name"], *flag.get("aliases", [])]
        options: dict[str, Any] = {"dest": flag["name"][2:], "default": flag["default"], "help": "See the manual."}
        if str(flag["default"]).startswith("(absent)"):
            options["default"] = argparse.SUPPRESS
        if flag["type"] == "flag":
            options["action"] = "store_true"
        else:
            options["type"] = TYPES[flag["type"]]
            if isinstance(flag.get("choices"), list):
                options["choices"] = flag["choices"]
            if flag["type"] == "str list":
                options["nargs"] = "+"
        result.add_argument(*names, **options)
    return result


def plugin_config(args: argparse.Namespace) -> dict[str, Any]:
    """Every plugin key with the command line's values over the defaults."""
    config = {key["name"]: key["default"] for key in TABLE["plugin_config_json_only"]}
    for flag in TABLE["flags"]:
        name = flag["name"][2:]
        if flag["group"].startswith("plugin") and hasattr(args, name):
            value = getattr(args, name)
            on_off = flag.get("value_style", "").startswith("enable")
            config[name] = value == "enable" if on_off else None if value == "disable" else value
    return config


def resolve(args: argparse.Namespace, pretrained: dict[str, Any], release: str) -> dict[str, Any]:
    """The build_config that build() ends with: sections 2 and 3 of the reference."""
    plugins = plugin_config(args)
    architecture, dtype = pretrained["architecture"], pretrained["dtype"]
    weights = pretrained["quantization"]["quant_algo"]
    kv_cache = pretrained["quantization"]["kv_cache_quant_algo"]
    ranks = pretrained["mapping"]["world_size"]
    assert not plugins["streamingllm"], "StreamingLLM is not supported"
    assert not plugins["pp_reduce_scatter"], "PP reduce scatter is only supported in the mixtral model."
    if plugins["reduce_fusion"] and (ranks == 1 or architecture not in SMOOTH_FUSED):
        log("reduce_fusion is not supported for this model, disabling", level="W")
        plugins["reduce_fusion"] = False
    plugins["user_buffer"] = plugins["user_buffer"] and plugins["reduce_fusion"]
    plugins["norm_quant_fusion"] = False
    plugins["paged_state"] = False
    if not plugins["context_fmha"]:
        plugins["use_fp8_context_fmha"] = plugins["use_paged_context_fmha"] = False
    if weights not in FP8_WEIGHTS:
        plugins["use_fp8_context_fmha"] = False
        if kv_cache == "FP8":
            plugins["use_paged_context_fmha"] = False
    elif plugins["use_paged_context_fmha"]:
        plugins["use_fp8_context_fmha"] = kv_cache == "FP8"
    if kv_cache == "INT8":
        plugins["use_paged_context_fmha"] = False
    if weights in ("W8A16", "W4A16"):
        plugins["weight_only_quant_matmul_plugin"] = dtype
    if weights and "SQ" in weights and weights.endswith("PLUGIN"):
        for name in ("smooth_quant_gemm_plugin", "rmsnorm_quantization_plugin", "layernorm_quantization_plugin"):
            plugins[name] = dtype
    plugins["nccl_plugin"] = dtype if ranks > 1 else None
    plugins["dtype"] = dtype
    plugins["paged_kv_cache"] = getattr(args, "kv_cache_type", "paged") == "paged"

    build = {key["name"]: key["default"] for key in TABLE["build_config_json"]["keys"]}
    del build["dry_run"], build["visualize_network"]
    build["lora_config"] = {}
    build["speculative_decoding_mode"] = 1
    del build["auto_parallel_config"]
    if has({"available": "<=1.0.x"}, release):
        build["auto_parallel_config"] = {"world_size": args.auto_parallel}
    build.update({name: value for name, value in vars(args).items() if name in build})
    limit = math.ceil(pretrained["max_position_embeddings"] or 2048)
    build["max_seq_len"] = build["max_seq_len"] or limit
    if build["max_seq_len"] > limit:
        log(f"max_seq_len {build['max_seq_len']} is larger than {limit}", level="W")
    log("padding removal and fMHA are both enabled, max_input_len is not required and will be ignored", level="W")
    most = build["max_batch_size"] * build["max_seq_len"]
    build["max_num_tokens"] = min(build["max_num_tokens"] or most, most)
    build["max_num_tokens"] = max(build["max_num_tokens"], plugins["tokens_per_block"])
    if not plugins["multiple_profiles"] or build["opt_num_tokens"] is not None:
        wanted = build["opt_num_tokens"] or build["max_batch_size"] * build["max_beam_width"]
        build["opt_num_tokens"] = min(wanted, build["max_num_tokens"])
    build["kv_cache_type"] = getattr(args, "kv_cache_type", "paged").upper()
    build["plugin_config"] = plugins
    return build


def load_rank(checkpoint: Path, rank: int, pretrained: dict[str, Any]) -> None:
    """Refuse a rank file that does not hold the tensors, or not in their shapes."""
    path = checkpoint / f"rank{rank}.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    mapping = pretrained["mapping"]
    tp, pp, stage = mapping["tp_size"], mapping["pp_size"], rank // mapping["tp_size"]
    heads, kv_heads = pretrained["num_attention_heads"], pretrained["num_key_value_heads"]
    rows = (heads // tp + 2 * max(1, kv_heads // tp)) * pretrained["head_size"]
    layers = pretrained["num_hidden_layers"] // pp
    required = {f"transformer.layers.{layer}.attention.qkv.bias": [rows] for layer in range(layers)}
    if stage == pp - 1:
        required["lm_head.weight"] = [math.ceil(pretrained["vocab_size"] / tp), pretrained["hidden_size"]]
    missing = set(required) - set(shapes)
    if missing:
        raise RuntimeError(f"Required but not provided tensors:{missing}")
    for name, shape in required.items():
        if shapes[name] != shape:
            problem = (
                f"The value updated is not the same shape as the original. Updated: {shapes[name]}, original: {shape}"
            )
            raise RuntimeError(f"Encounter error '{problem}' for parameter '{name}'")


def fail(how: str) -> None:
    """End as the real program does."""
    if how == "out_of_memory":
        size = "Error Code 2: OutOfMemory (Requested size was 24793579520 bytes.)"
        log(
            "Requested amount of GPU memory (24793579520 bytes) could not be allocated. There may not be enough free "
            "memory for allocation to succeed.",
            "TRT",
            "W",
        )
        log(
            f"[virtualMemoryBuffer.cpp::nvinfer1::StdVirtualMemoryBufferImpl::resizePhysical::154] {size}", "TRT", "E"
        )
        log(f"[globWriter.cpp::makeResizableGpuMemory::435] {size}", "TRT", "E")
        raise AssertionError("Engine building failed, please check the error log.")
    if how == "no_gpu":
        raise RuntimeError("No CUDA GPUs are available")
    if how == "no_workers":
        raise ValueError("max_workers must be greater than 0")
    if how == "pool":
        print(
            "concurrent.futures.process.BrokenProcessPool: A process in the process pool was terminated "
            "abruptly while the future was running or pending.",
            flush=True,
        )
        raise AssertionError("Engine building failed, please check error log.")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit137":
        sys.exit(137)
    if how == "silent":
        sys.exit(3)
    if how == "hang":
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
        print(f"child {child.pid}", flush=True)
        time.sleep(100)
    if how == "orphan":  # a rank lives on, with our output in hand
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
        os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str], release: str, gpus: int, how: str = "") -> None:
    """Build, or fail; the engine directory is complete when this returns."""
    if how == "help":
        raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")
    args = parser(release).parse_args(argv)
    print(f"[TensorRT-LLM] TensorRT-LLM version: {release}", flush=True)
    if args.multiple_profiles == "enable" and args.opt_num_tokens is not None:
        raise RuntimeError(
            "multiple_profiles is enabled, while opt_num_tokens is set. They are not supposed to be "
            "working in the same time for now."
        )
    if gpus == 0:
        fail("no_gpu")
    source = Path(args.checkpoint_dir)
    weightless = source.suffix == ".json"
    pretrained = json.loads((source if weightless else source / "config.json").read_text())
    if args.logits_dtype is not None:
        pretrained["logits_dtype"] = args.logits_dtype
    build = resolve(args, pretrained, release)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    ranks = pretrained["mapping"]["world_size"]
    for rank in range(ranks):
        if not weightless:
            load_rank(source, rank, pretrained)
        log("Build TensorRT engine Unnamed Network 0")
        if rank == ranks - 1:
            fail(how)
        log("Total time of building Unnamed Network 0: 00:00:36")
        if rank == 0 and how != "no_config":
            config = {"version": release, "pretrained_config": pretrained, "build_config": build}
            (output / "config.json").write_text(json.dumps(config, indent=4))
            Path(args.output_timing_cache).write_bytes(b"timing cache")
        if how == "lost_rank" and rank == ranks - 1:
            continue
        log(f"Serializing engine to {output / f'rank{rank}.engine'}...")
        plan = b"" if how == "empty_rank" and rank == ranks - 1 else b"engine of rank %d" % rank
        (output / f"rank{rank}.engine").write_bytes(plan)
        log("Engine serialized. Total time: 00:00:02")
    log("Total time of building all engines: 00:00:41")


def count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return len(listing.stdout.splitlines())


if __name__ == "__main__":
    main(sys.argv[1:], metadata.version("tensorrt_llm"), count_gpus(), os.environ.get("STANDIN_FAIL", ""))

"""Measures `trtqwen convert`: rate against a plain write of the same bytes, and peak resident memory.

Makes a model of Qwen2.5's shape with random bfloat16 weights, runs the real command once for each mode (start-up
included), and after each run writes files of the same sizes to the same disk with one fsync each: the yardstick.
On virtual machines the first touch of memory takes up to ten times as long as the next, so that single runs say
little. ModelOpt's export of the same model (`--modelopt`) and calibration (`--calibrate`) are measured alike.

    bench_convert.py WORK --shape 1.5b --tp 2 --mode fp16 --mode int8_wo
    bench_convert.py WORK --shape 7b --tp 4 --mode fp16 --calibrate 4
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from trtqwen.demo import MODEL
from trtqwen.hf.config import HfConfig, load_config
from trtqwen.hf.tokenizer_files import TOKENIZER_FILES
from trtqwen.hf.weights import INDEX
from trtqwen.quantize.ranges import write_ranges
from trtqwen.quantize.smoothquant import ActivationRange
from trtqwen.quantize.texts import CALIBRATION, read_texts
from trtqwen.safetensors_io.format import Array, TensorSpec
from trtqwen.safetensors_io.writer import SafetensorsWriter

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARD_BYTES = 4_000_000_000
BLOCK_BYTES = 8 << 20
OUT = "OUT"  # stands for the output directory in a command
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "72b-1-layer": {  # the largest tensors of the family, for the peak of memory
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
MODELOPT = """
import sys, torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
export_tensorrt_llm_checkpoint(
    model, "llama", torch.float16, export_dir=sys.argv[2], inference_tensor_parallel=int(sys.argv[3])
)
"""


class Shape(str, Enum):
    """Whose sizes the random model has."""

    small = "1.5b"
    large = "7b"
    largest = "72b-1-layer"


class Mode(str, Enum):
    """What is converted to; the value is the row's name."""

    fp16 = "fp16"
    bf16 = "bf16"
    int8_wo = "int8_wo"
    int8_wo_plain = "int8_wo_plain"
    int8_sq = "int8_sq"
    int8_kv = "int8_kv"


OPTIONS: dict[Mode, list[str]] = {
    Mode.fp16: ["--dtype", "float16"],
    Mode.bf16: ["--dtype", "bfloat16"],
    Mode.int8_wo: ["--dtype", "float16", "--quant", "int8_wo", "--int8-layout", "sm80"],
    Mode.int8_wo_plain: ["--dtype", "float16", "--quant", "int8_wo"],
    Mode.int8_sq: ["--dtype", "float16", "--quant", "int8_sq", "--per-channel", "--per-token"],
    Mode.int8_kv: ["--dtype", "float16", "--kv-cache", "int8"],
}


@dataclass(frozen=True)
class Row:
    """One measured command; medians where it ran several times.

    Attributes:
        seconds: wall time, start-up included.
        nbytes: size of the output directory.
        yardstick_seconds: a plain write of as many bytes.
        ratios: of each run, the yardstick's seconds by the command's: its rate relative to the yardstick's.
        peak_bytes: the process's largest resident memory, mapped file pages included.
        cpu_seconds: user and system time of the process.
    """

    name: str
    seconds: float
    nbytes: int
    yardstick_seconds: float
    ratios: list[float]
    peak_bytes: int
    cpu_seconds: float


def main(
    work: Annotated[Path, typer.Argument(help="Directory on the disk to measure; made if missing.")],
    shape: Annotated[Shape, typer.Option(help="Whose sizes the model has.")] = Shape.small,
    tp: Annotated[int, typer.Option(min=1, max=8, help="Tensor-parallel ranks.")] = 2,
    mode: Annotated[list[Mode] | None, typer.Option(help="Mode to run; may be repeated. [default: all]")] = None,
    calibrate: Annotated[int, typer.Option(min=0, help="Also calibrate, with this many texts of 512 tokens.")] = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each mode.")] = 3,
    modelopt: Annotated[
        bool, typer.Option("--modelopt", help="Also run ModelOpt's export: holds the model.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the model for the next run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a random model in every mode and compare with plain writes."""
    model = work / f"model-{shape.value}"
    work.mkdir(parents=True, exist_ok=True)
    try:
        if not (model / "config.json").exists():
            write_model(model, SHAPES[shape.value])
        rows: list[Row] = []
        for row in measure_all(model, work, tp, mode or list(Mode), calibrate, repeat, modelopt=modelopt):
            rows.append(row)
            print(f"{row.name}: {row.seconds:.1f} s", file=sys.stderr)
    finally:
        if not keep:
            shutil.rmtree(model, ignore_errors=True)
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        Console().print(_table(f"{shape.value} shape, TP {tp}", rows))


def measure_all(
    model: Path, work: Path, tp: int, modes: list[Mode], calibrate: int, repeat: int, *, modelopt: bool
) -> Iterator[Row]:
    """Run one command after another, each to a fresh directory that is removed afterwards."""
    convert = [sys.executable, "-m", "trtqwen", "convert", str(model), "--tp", str(tp), "--no-quality"]
    ranges = _random_ranges(load_config(model), work / "ranges.safetensors")
    for mode in modes:
        given = ["--act-ranges", str(ranges)] if mode in (Mode.int8_sq, Mode.int8_kv) else []
        yield measure(mode.value, [*convert, *OPTIONS[mode], *given, "-o", OUT], model, work, repeat)
    if calibrate:
        texts = _long_texts(calibrate, work / "texts.jsonl")
        command = [*convert, *OPTIONS[Mode.int8_sq], "--calib", str(texts), "-o", OUT]
        yield measure(f"int8_sq, calibrated on {calibrate} texts", command, model, work, 1)
    if modelopt:
        yield measure("ModelOpt fp16", [sys.executable, "-c", MODELOPT, str(model), OUT, str(tp)], model, work, 1)


def measure(name: str, command: list[str], model: Path, work: Path, repeat: int) -> Row:
    """Run a command that writes the directory `OUT`, and the yardstick, alternately; medians of both.

    The disk is idle before each, and the model is read before each command, so that as much of it is cached as
    memory holds.

    Raises:
        SystemExit: with the command's own error, if it fails.
    """
    out = work / "out"
    runs = []
    for _ in range(repeat):
        _read(model)
        os.sync()
        seconds, usage = _run(name, [str(out) if word == OUT else word for word in command])
        sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        shutil.rmtree(out)
        runs.append((seconds, plain_write(out, sizes), usage))
    return Row(
        name,
        seconds=median(run[0] for run in runs),
        nbytes=sum(sizes),
        yardstick_seconds=median(run[1] for run in runs),
        ratios=[run[1] / run[0] for run in runs],
        peak_bytes=max(run[2].ru_maxrss for run in runs) * 1024,
        cpu_seconds=median(run[2].ru_utime + run[2].ru_stime for run in runs),
    )


def _run(name: str, command: list[str]) -> tuple[float, resource.struct_rusage]:
    """Seconds and use of resources; the peak starts at this small process's own size, which the child inherits."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name}: {errors}")
    return seconds, usage


def _read(directory: Path) -> None:
    buffer = bytearray(BLOCK_BYTES)
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def plain_write(directory: Path, sizes: list[int]) -> float:
    """Seconds to write fresh files of these sizes from memory, with one fsync each; removes them."""
    block = memoryview(np.random.default_rng(0).bytes(BLOCK_BYTES))
    directory.mkdir()
    os.sync()
    start = time.perf_counter()
    for index, size in enumerate(sizes):
        with (directory / str(index)).open("wb", buffering=0) as file:
            while size > 0:
                size -= file.write(block[:size])
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(directory)
    return seconds


def write_model(directory: Path, shape: dict[str, Any]) -> None:
    """A model directory of this shape with random bfloat16 weights, in shards with an index, with a tokenizer."""
    directory.mkdir(parents=True)
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, dimensions in _tensors(shape):
        spec = TensorSpec(dimensions, BFLOAT16)
        if sum(other.nbytes for other in shards[-1].values()) + spec.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    normal = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 2, np.float32)
    values = (normal * 0.02).astype(BFLOAT16)
    weight_map: dict[str, str] = {}
    for index, plan in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(plan, file)
        with SafetensorsWriter(directory / file, plan) as writer:
            for name, spec in plan.items():
                writer.write(name, [np.ones(spec.shape)] if "norm" in name else _tiles(values, spec.shape))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in TOKENIZER_FILES:
        if (MODEL / name).exists():
            shutil.copyfile(MODEL / name, directory / name)
    config = json.loads((MODEL / "config.json").read_text()) | shape
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))


def _tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for letter, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}.self_attn.{letter}_proj.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{letter}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (shape["vocab_size"], hidden)


def _tiles(values: Array, shape: tuple[int, ...]) -> list[Array]:
    """The same values over and over in this shape: parts along the first axis, all views."""
    if len(shape) == 1:
        return [values[: shape[0]]]
    rows = min(len(values) // shape[1], shape[0])
    tile = values[: rows * shape[1]].reshape(rows, shape[1])
    return [tile[: min(rows, shape[0] - start)] for start in range(0, shape[0], rows)]


def _random_ranges(config: HfConfig, path: Path) -> Path:
    """Activation ranges with the outliers that real models have, so that no calibration is timed."""
    rng = np.random.default_rng(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.head_size * config.num_key_value_heads
    sizes = {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)}
    linears = {f"self_attn.{name}": size for name, size in sizes.items()}
    linears |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}

    def spread(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.lognormal(0, 1, size).astype(np.float32)

    layers = range(config.num_hidden_layers)
    ranges = {
        f"model.layers.{layer}.{name}": ActivationRange(spread(into), spread(out))
        for layer in layers
        for name, (into, out) in linears.items()
    }
    write_ranges(ranges, path)
    return path


def _long_texts(count: int, path: Path) -> Path:
    """Texts that fill the 512 tokens which calibration takes of each."""
    whole = " ".join(read_texts(CALIBRATION))
    texts = [whole[1000 * index % (len(whole) // 2) :][:8000] for index in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for column in ("mode", "seconds", "GB", "MB/s", "plain write, s", "ratio", "peak MB", "CPU s"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.seconds:.1f}",
            f"{row.nbytes / 1e9:.2f}",
            f"{row.nbytes / row.seconds / 1e6:.0f}",
            f"{row.yardstick_seconds:.1f}",
            " ".join(f"{ratio:.2f}" for ratio in row.ratios),
            f"{row.peak_bytes / 1e6:.0f}",
            f"{row.cpu_seconds:.1f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)

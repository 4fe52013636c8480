"""Makes an engine of the torch backend with random weights, in the shape of a known model, without its files.

Other engines get the same weights from `export_model`. Weights that an engine makes for itself can change its speed:
products of zeros and of tiny numbers take less power, and a card at its power limit then runs faster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtqwen.artifact.manifest import write_manifest
from trtqwen.artifact.names import CONFIG, TOKENIZER_DIRECTORY, rank_weights
from trtqwen.checkpoint.config import Dtype, checkpoint_config
from trtqwen.checkpoint.convert import NUMPY_DTYPES
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.rule import Precision
from trtqwen.checkpoint.sharding import Split
from trtqwen.checkpoint.tensors import RuleBook
from trtqwen.demo import MODEL
from trtqwen.engine.builder import build_engine
from trtqwen.export.export import plan_export, run_export
from trtqwen.hf.known import known_config
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.smoothquant import SmoothQuantMode
from trtqwen.recipe import CheckpointRecipe, EngineRecipe, ServeRecipe
from trtqwen.safetensors_io.format import TensorSpec
from trtqwen.safetensors_io.writer import SafetensorsWriter
from trtqwen.triton.repository import write_repository

PRECISIONS = {
    "fp16": CheckpointRecipe(dtype="float16"),
    "bf16": CheckpointRecipe(dtype="bfloat16"),
    "w8a8": CheckpointRecipe(dtype="float16", quant="int8_sq", per_channel=True, per_token=True),
    "w8a8-static": CheckpointRecipe(dtype="float16", quant="int8_sq", per_channel=True),
    "w8a16": CheckpointRecipe(dtype="float16", quant="int8_wo", int8_layout="sm80"),
    "fp16-int8kv": CheckpointRecipe(dtype="float16", kv_cache="int8"),
}
SPREAD = 0.02  # standard deviation of the weights


def make_checkpoint(directory: Path, model: str, precision: str, tp_size: int) -> None:
    """Write a checkpoint with a tokenizer to `directory`.

    Weights are normal with `SPREAD`, gains are 1, INT8 codes uniform with scales that give the same spread.
    """
    settings = PRECISIONS[precision].model_copy(update={"tp_size": tp_size})
    hf = known_config(model)
    mapping = RankMapping(tp_size, 1)
    smooth = SmoothQuantMode(settings.per_channel, settings.per_token) if settings.quant == "int8_sq" else None
    layout = settings.int8_layout if settings.quant == "int8_wo" and settings.int8_layout != "plain" else None
    dtype: Dtype = "bfloat16" if settings.dtype == "bfloat16" else "float16"
    parts = Precision(
        dtype=NUMPY_DTYPES[dtype],
        int8_layout=layout,
        smoothquant=smooth,
        int8_kv_cache=settings.kv_cache == "int8",
    )
    rules = list(RuleBook(hf, mapping, parts, embedding=Split.REPLICATED).rules(tied=False))
    quantization: dict[str, object] = {}
    if smooth is not None:
        kind = "PER_CHANNEL" if smooth.per_channel else "PER_TENSOR"
        quantization["quant_algo"] = f"W8A8_SQ_{kind}_PER_{'TOKEN' if smooth.per_token else 'TENSOR'}_PLUGIN"
    elif settings.quant == "int8_wo":
        quantization["quant_algo"] = "W8A16"
    if settings.kv_cache == "int8":
        quantization["kv_cache_quant_algo"] = "INT8"
    directory.mkdir(parents=True)
    write_tokenizer(directory / TOKENIZER_DIRECTORY, hf.vocab_size)
    digests = {}
    for rank in range(tp_size):
        specs = {name: spec for rule in rules for name, spec in rule.specs.items()}
        path = directory / rank_weights(rank)
        with SafetensorsWriter(path, specs) as writer:
            for name, spec in specs.items():
                writer.write(name, [_fill(name, spec, rank)])
        digests[path.name] = writer.digest()
    content = checkpoint_config(
        hf,
        dtype,
        mapping,
        quantization=quantization,
        embedding_sharding="none",
        calibrated=settings.calibrated,
        release="1.2.1",
    )
    (directory / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    write_manifest(directory, "checkpoint", {}, settings.model_dump(exclude={"calib", "act_ranges"}), digests)


def make_engine(directory: Path, model: str, precision: str, tp_size: int, limits: EngineRecipe) -> Path:
    """Write `directory`/checkpoint and `directory`/engine; the engine's path."""
    make_checkpoint(directory / "checkpoint", model, precision, tp_size)
    build_engine(directory / "checkpoint", limits, directory / "engine")
    return directory / "engine"


def make_repository(
    directory: Path, model: str, precision: str, tp_size: int, limits: EngineRecipe
) -> tuple[Path, Path]:
    """`make_engine` with a model repository, and the same weights as a Hugging Face directory."""
    engine = make_engine(directory, model, precision, tp_size, limits)
    write_repository(engine, ServeRecipe(triton_max_batch_size=limits.max_batch_size), directory / "repo")
    export_model(directory / "checkpoint", directory / "hf")
    return directory / "repo", directory / "hf"


def export_model(checkpoint: Path, directory: Path) -> None:
    """Write a checkpoint of `make_checkpoint` as a Hugging Face directory, for other engines."""
    run_export(plan_export(checkpoint), directory)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """The bundled tokenizer, filled up with words: every token that random weights choose has a text of its own.

    A token without text would reach the client with a later one, and its time would not be measured.
    """
    directory.mkdir(parents=True, exist_ok=True)
    Tokenizer(MODEL).write(directory)
    path = directory / "tokenizer.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), vocab_size)}
    path.write_text(json.dumps(content), "utf-8")


def _fill(name: str, spec: TensorSpec, rank: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(hash((len(name), name[-20:], rank)) % 2**31)
    if spec.dtype == np.int8:
        codes = torch.randint(-127, 128, spec.shape, dtype=torch.int8, device=device, generator=generator)
        return codes.cpu().numpy()
    if name.endswith(("per_channel_scale", "act_scale")):
        return np.full(spec.shape, SPREAD / 73 if name.endswith("per_channel_scale") else 0.05, spec.dtype)
    if name.endswith(("scale_to_int", "quantization_scaling_factor")):
        return np.full(spec.shape, 20.0, spec.dtype)
    if name.endswith("kv_cache_scaling_factor"):
        return np.full(spec.shape, 0.05, spec.dtype)
    if name.endswith(("smoother",)) or "norm" in name or name.endswith("ln_f.weight"):
        return np.ones(spec.shape, spec.dtype)
    values = torch.randn(spec.shape, device=device, generator=generator, dtype=torch.float16) * SPREAD
    return values.cpu().numpy().astype(spec.dtype)


def main() -> None:
    """Parse the command line and write the engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--max-seq-len", type=int, default=4096)
    options = parser.parse_args()
    limits = EngineRecipe(
        backend="torch",
        max_batch_size=options.max_batch_size,
        max_num_tokens=options.max_num_tokens,
        max_seq_len=options.max_seq_len,
    )
    print(make_engine(options.output, options.model, options.precision, options.tp, limits))


if __name__ == "__main__":
    main()

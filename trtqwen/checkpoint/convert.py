"""From a Hugging Face directory to a TensorRT-LLM checkpoint: all ranks in one pass over the source.

Resident memory: one source tensor (mapped, given back after use) and one 8 MiB block of output.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from trtqwen.artifact import Manifest, finished_directory, stage_key, write_manifest
from trtqwen.checkpoint.config import Dtype, checkpoint_config
from trtqwen.checkpoint.layout import LM_HEAD, TensorRule, check_parallel, shard, tensor_rules
from trtqwen.checkpoint.mapping import Mapping
from trtqwen.errors import SourceError
from trtqwen.hf.source import HfModel
from trtqwen.safetensors_io import SafetensorsWriter, TensorSpec

TOKENIZER_DIRECTORY = "tokenizer"
NUMPY_DTYPES: dict[Dtype, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Attributes:
        dtype: dtype of the weights written.
        rules: the tensors, in file order.
        ranks: for each rank file, its tensors with shapes and dtypes.
        parameters: what, beside the source, decides the result.
    """

    source: HfModel
    dtype: Dtype
    mapping: Mapping
    rules: tuple[TensorRule, ...]
    ranks: tuple[dict[str, TensorSpec], ...]
    parameters: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(spec.nbytes for rank in self.ranks for spec in rank.values())

    @property
    def ignored(self) -> list[str]:
        """Source tensors that the checkpoint does not hold."""
        used = {name for rule in self.rules for name in rule.sources}
        return sorted(name for name in self.source if name not in used)

    def key(self) -> str:
        """The manifest key of the result; reads the source to take its digests."""
        return stage_key("checkpoint", self.source.digests(), self.parameters)


def plan_conversion(model: Path, dtype: Dtype | Literal["auto"] = "auto", tp_size: int = 1) -> ConversionPlan:
    """Check the source against its config and lay out every rank file.

    Args:
        dtype: `auto` keeps the source's 16-bit dtype; float32 sources become float16, as NVIDIA's converter does.

    Raises:
        SourceError: if a tensor is missing, of another shape, or not 16- or 32-bit floating point.
        CheckpointError: if the model does not split over the ranks.
    """
    source = HfModel(model)
    config, mapping = source.config, Mapping(tp_size)
    check_parallel(config, mapping)
    resolved: Dtype = _auto_dtype(config.torch_dtype) if dtype == "auto" else dtype
    tied = config.tie_word_embeddings or LM_HEAD not in source
    rules = tuple(tensor_rules(config, mapping, tied=tied))
    for rule in rules:
        _check_sources(source, rule)
    ranks: tuple[dict[str, TensorSpec], ...] = tuple({} for _ in range(mapping.world_size))
    for rule in rules:
        tensors = [source.tensor(name) for name in rule.sources]
        for rank in mapping.stage_ranks(rule.stage):
            parts = shard(rule.split, tensors, config, tp_size, mapping.tp_rank(rank))
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            ranks[rank][rule.name] = TensorSpec(shape, NUMPY_DTYPES[resolved])
    parameters = {"dtype": resolved, "tp_size": tp_size}
    return ConversionPlan(source, resolved, mapping, rules, ranks, parameters)


def run_conversion(
    plan: ConversionPlan, output: Path, *, force: bool = False, progress: Progress = lambda count: None
) -> Manifest:
    """Write the checkpoint directory: config.json, rank files, tokenizer files and the manifest.

    Args:
        progress: called with the bytes written since the last call.

    Raises:
        OutputError: if `output` exists and `force` is not set, or cannot be written.
    """
    source, config = plan.source, plan.source.config
    with finished_directory(output, force=force) as directory:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(SafetensorsWriter(directory / f"rank{rank}.safetensors", specs))
                for rank, specs in enumerate(plan.ranks)
            ]
            for rule in plan.rules:
                tensors = [source.tensor(name) for name in rule.sources]
                for rank in plan.mapping.stage_ranks(rule.stage):
                    parts = shard(rule.split, tensors, config, plan.mapping.tp_size, plan.mapping.tp_rank(rank))
                    progress(writers[rank].write(rule.name, parts))
                for name in rule.sources:
                    source.finish(name)
        content = checkpoint_config(config, plan.dtype, plan.mapping)
        (directory / "config.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
        if source.tokenizer_files:
            (directory / TOKENIZER_DIRECTORY).mkdir()
        for path in source.tokenizer_files:
            shutil.copyfile(path, directory / TOKENIZER_DIRECTORY / path.name)
        known = {writer.path.name: writer.digest() for writer in writers}
        return write_manifest(directory, "checkpoint", source.digests(), plan.parameters, known)


def _auto_dtype(torch_dtype: str | None) -> Dtype:
    return "bfloat16" if torch_dtype == "bfloat16" else "float16"


def _check_sources(source: HfModel, rule: TensorRule) -> None:
    for name, shape in zip(rule.sources, rule.source_shapes, strict=True):
        spec = source.spec(name)
        if spec.shape != shape:
            raise SourceError(
                f"{source.directory}: tensor {name!r} has shape {list(spec.shape)}, but config.json makes it "
                f"{list(shape)}; config.json and weights are of different models"
            )
        if spec.dtype not in NUMPY_DTYPES.values():
            raise SourceError(
                f"{source.directory}: tensor {name!r} is {spec.dtype}; trtqwen converts float16, bfloat16 and float32"
            )

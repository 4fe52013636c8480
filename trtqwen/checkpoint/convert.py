"""From a Hugging Face directory to a TensorRT-LLM checkpoint: all ranks in one pass over the source.

Resident memory: one source tensor (mapped, given back after use) and one 8 MiB block of output.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trtqwen.artifact import Manifest, finished_directory, stage_key, write_manifest
from trtqwen.checkpoint.checks import check_disk, check_settings
from trtqwen.checkpoint.config import Dtype, checkpoint_config
from trtqwen.checkpoint.layout import Split
from trtqwen.checkpoint.mapping import Mapping
from trtqwen.checkpoint.rules import LM_HEAD, Precision, Rule, RuleBook
from trtqwen.errors import SourceError
from trtqwen.hf.source import HfModel
from trtqwen.quantize.calibrate import activation_ranges, calibration_inputs
from trtqwen.quantize.ranges import ACT_RANGES, write_ranges
from trtqwen.quantize.smoothquant import SmoothQuantMode
from trtqwen.recipe import CheckpointRecipe
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
        dtype: dtype of what is not quantised.
        rules: how each tensor is made, in file order; without activation ranges yet.
        parameters: what, beside the source, decides the result.
    """

    source: HfModel
    settings: CheckpointRecipe
    dtype: Dtype
    mapping: Mapping
    precision: Precision
    rules: tuple[Rule, ...]
    parameters: dict[str, Any]

    @property
    def ranks(self) -> list[dict[str, TensorSpec]]:
        """For each rank file, its tensors with shapes and dtypes."""
        files: list[dict[str, TensorSpec]] = [{} for _ in range(self.mapping.world_size)]
        for rule in self.rules:
            for rank in self.mapping.stage_ranks(rule.stage):
                files[rank].update(rule.specs)
        return files

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
        return stage_key("checkpoint", self.inputs(), self.parameters)

    def inputs(self) -> dict[str, str]:
        """Digests of everything the result is made of."""
        return self.source.digests() | calibration_inputs(self.settings)


def plan_conversion(model: Path, settings: CheckpointRecipe | None = None) -> ConversionPlan:
    """Check the source against its config and lay out every rank file.

    Raises:
        SourceError: if a tensor is missing, of another shape, or not 16- or 32-bit floating point.
        CheckpointError: if the model cannot be converted as asked.
    """
    settings = settings or CheckpointRecipe()
    source = HfModel(model)
    config, mapping = source.config, Mapping(settings.tp_size, settings.pp_size)
    check_settings(config, mapping, settings)
    dtype: Dtype = _auto_dtype(config.torch_dtype) if settings.dtype == "auto" else settings.dtype
    precision = _precision(settings, dtype)
    plan = ConversionPlan(
        source=source,
        settings=settings,
        dtype=dtype,
        mapping=mapping,
        precision=precision,
        rules=_rules(source, settings, mapping, precision),
        parameters={**settings.model_dump(exclude={"calib", "act_ranges"}), "dtype": dtype},
    )
    for rule in plan.rules:
        for name, shape in rule.sources.items():
            _check_source(source, name, shape)
    return plan


def run_conversion(
    plan: ConversionPlan, output: Path, *, force: bool = False, progress: Progress = lambda count: None
) -> Manifest:
    """Write the checkpoint directory: config.json, rank files, tokenizer files and the manifest.

    Args:
        progress: called with the bytes written since the last call.

    Raises:
        OutputError: if `output` exists and `force` is not set, or cannot be written.
        SourceError: if weights are not finite.
    """
    check_disk(output, plan.nbytes)
    with finished_directory(output, force=force) as directory:
        ranges = activation_ranges(plan.source, plan.settings) if plan.settings.calibrated else None
        digests = _write_ranks(replace(plan, precision=replace(plan.precision, ranges=ranges)), directory, progress)
        if ranges is not None:
            write_ranges(ranges, directory / ACT_RANGES)
        (directory / "config.json").write_text(json.dumps(_config(plan), indent=4), encoding="utf-8")
        if plan.source.tokenizer_files:
            (directory / TOKENIZER_DIRECTORY).mkdir()
        for path in plan.source.tokenizer_files:
            shutil.copyfile(path, directory / TOKENIZER_DIRECTORY / path.name)
        return write_manifest(directory, "checkpoint", plan.inputs(), plan.parameters, digests)


def _write_ranks(plan: ConversionPlan, directory: Path, progress: Progress) -> dict[str, str]:
    """Write every rank file in one pass over the source; returns their digests."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(SafetensorsWriter(directory / f"rank{rank}.safetensors", specs))
            for rank, specs in enumerate(plan.ranks)
        ]
        for rule in _rules(plan.source, plan.settings, plan.mapping, plan.precision):
            tensors = [plan.source.tensor(name) for name in rule.sources]
            ranks = plan.mapping.stage_ranks(rule.stage)
            for rank, parts in zip(ranks, rule.produce(tensors), strict=True):
                for name in rule.specs:
                    progress(writers[rank].write(name, parts[name], via=rule.via))
            for name in rule.sources:
                plan.source.finish(name)
    return {writer.path.name: writer.digest() for writer in writers}


def _rules(source: HfModel, settings: CheckpointRecipe, mapping: Mapping, precision: Precision) -> tuple[Rule, ...]:
    splits = {"none": Split.REPLICATED, "vocab": Split.VOCAB, "hidden": Split.ROW}
    book = RuleBook(source.config, mapping, precision, embedding=splits[settings.embedding_sharding])
    return tuple(book.rules(tied=source.config.tie_word_embeddings or LM_HEAD not in source))


def _precision(settings: CheckpointRecipe, dtype: Dtype) -> Precision:
    weight_only = settings.quant == "int8_wo" and settings.int8_layout != "plain"
    smooth = SmoothQuantMode(settings.per_channel, settings.per_token) if settings.quant == "int8_sq" else None
    return Precision(
        dtype=NUMPY_DTYPES[dtype],
        int8_layout=settings.int8_layout if weight_only and settings.int8_layout != "plain" else None,
        smoothquant=smooth,
        alpha=settings.sq_alpha,
        int8_kv_cache=settings.kv_cache == "int8",
    )


def _config(plan: ConversionPlan) -> dict[str, Any]:
    settings, smooth = plan.settings, plan.precision.smoothquant
    quantization: dict[str, Any] = {}
    if settings.quant == "int8_wo":
        quantization["quant_algo"] = "W8A16"
    if smooth is not None:
        quantization |= {"quant_algo": smooth.quant_algo, "smoothquant_val": settings.sq_alpha}
    if settings.kv_cache == "int8":
        quantization["kv_cache_quant_algo"] = "INT8"
    return checkpoint_config(
        plan.source.config,
        plan.dtype,
        plan.mapping,
        quantization=quantization,
        embedding_sharding=settings.embedding_sharding,
        calibrated=settings.calibrated,
        release=settings.release,
    )


def _auto_dtype(torch_dtype: str | None) -> Dtype:
    return "bfloat16" if torch_dtype == "bfloat16" else "float16"


def _check_source(source: HfModel, name: str, shape: tuple[int, ...]) -> None:
    spec = source.spec(name)
    if spec.shape != shape:
        raise SourceError(
            f"{source.directory}: tensor {name!r} has shape {list(spec.shape)}, but config.json makes it "
            f"{list(shape)}; config.json and weights are of different models"
        )
    if spec.dtype not in NUMPY_DTYPES.values():
        raise SourceError(
            f"{source.directory}: tensor {name!r} is {spec.dtype}; trtqwen converts 16- and 32-bit floats"
        )

"""From a Hugging Face directory to a TensorRT-LLM checkpoint: all ranks in one pass over the source.

A thread reads and checks the tensors that come next, the main thread casts or quantizes, and each rank file's own
thread writes. Resident memory: the source tensors in use (mapped, released after use) and 8 MiB of buffers for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trtqwen.artifact.manifest import Manifest, stage_key
from trtqwen.artifact.names import CONFIG, TOKENIZER_DIRECTORY, rank_weights
from trtqwen.artifact.stage import BuildEvents, Stage
from trtqwen.checkpoint.checks import check_disk, check_settings, write_hint
from trtqwen.checkpoint.config import Dtype, checkpoint_config, resolved_dtype
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.rule import Precision, Ranges, Rule
from trtqwen.checkpoint.sharding import Split
from trtqwen.checkpoint.tensors import RuleBook
from trtqwen.diagnostics import CheckpointError, Diagnostic, OutputError
from trtqwen.hf.checks import check_model, has_tokenizer
from trtqwen.hf.source import HfModel
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.quantize.calibrate import activation_ranges, calibration_inputs
from trtqwen.quantize.outliers import check_int8_kv_cache
from trtqwen.quantize.ranges import ACT_RANGES, write_ranges
from trtqwen.quantize.smoothquant import SmoothQuantMode
from trtqwen.recipe import CheckpointRecipe
from trtqwen.safetensors_io.format import TensorSpec
from trtqwen.safetensors_io.writer import SafetensorsWriter, write_to_all
from trtqwen.system.steady import SteadyFiles

NUMPY_DTYPES: dict[Dtype, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
FLOAT16_OVERFLOW = 65520.0  # rounds to infinity
_LARGE_BYTES = 256 << 20  # passes over larger tensors give their pages back on the way
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ConversionPlan:
    """The plan of a conversion.

    Attributes:
        dtype: dtype of tensors that are not quantized.
        rules: how each tensor is made, in file order.
        parameters: all settings that change the result.
        tokenizer: the model's; None for a model without tokenizer files.
        findings: notes on the model, such as defaults that apply and tensors that are not read.
        files: the source's files, as they were when the plan was made.
    """

    source: HfModel
    settings: CheckpointRecipe
    dtype: Dtype
    mapping: RankMapping
    precision: Precision
    rules: tuple[Rule, ...]
    parameters: dict[str, Any]
    tokenizer: Tokenizer | None
    findings: tuple[Diagnostic, ...]
    files: SteadyFiles

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
        """Return the digests of all inputs."""
        return self.source.digests() | calibration_inputs(self.settings)


Inspect = Callable[[ConversionPlan, Path, Ranges], None]


def plan_conversion(model: Path, settings: CheckpointRecipe | None = None) -> ConversionPlan:
    """Check the source against its config and plan every rank file.

    Raises:
        SourceError: if config, weights, tokenizer or chat template cannot be served.
        CheckpointError: if the model cannot be converted as asked.
    """
    settings = settings or CheckpointRecipe()
    source = HfModel(model, settings.yarn_factor)
    tokenizer, findings = check_model(source) if has_tokenizer(model) else (None, source.findings)
    config, mapping = source.config, RankMapping(settings.tp_size, settings.pp_size)
    check_settings(config, mapping, settings)
    dtype = resolved_dtype(settings.dtype, config)
    precision = _precision(settings, dtype)
    return ConversionPlan(
        source=source,
        settings=settings,
        dtype=dtype,
        mapping=mapping,
        precision=precision,
        rules=_rules(source, settings, mapping, precision),
        parameters={**settings.model_dump(exclude={"calib", "act_ranges"}), "dtype": dtype},
        tokenizer=tokenizer,
        findings=findings,
        files=SteadyFiles([*source.files, model / CONFIG, *source.tokenizer_files]),
    )


class CheckpointStage(Stage):
    """The first stage of a build: config.json, rank files, tokenizer files."""

    name = section = "checkpoint"

    def __init__(self, plan: ConversionPlan, directory: Path) -> None:
        self.plan = plan
        self.directory = directory

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.plan.source.directory,)

    def inputs(self) -> dict[str, str]:
        return self.plan.inputs()

    def parameters(self) -> dict[str, Any]:
        return self.plan.parameters

    def warnings(self) -> list[str]:
        return [str(finding) for finding in self.plan.findings]

    def check(self, *, force: bool) -> None:
        """Refuse an INT8 KV cache that the model's k_proj biases would spoil, unless `force` is set, and a full disk.

        Raises:
            InputError: naming the layers.
            OutputError: if the disk has no room.
        """
        check_kv_cache(self.plan, force=force)
        check_disk(self.directory, self.plan.nbytes)

    def run(self, directory: Path, events: BuildEvents) -> Mapping[str, str]:
        """Write everything but the manifest.

        Raises:
            SourceError: if weights are not finite, or the source changes meanwhile.
            CheckpointError: if weights overflow float16 during the conversion.
            OutputError: if the disk is full or fails.
        """
        plan = self.plan
        with plan.files.held():
            plan.source.map_files(plan.files.leased)
            calibrated = plan.settings.calibrated
            ranges = activation_ranges(plan.source, plan.settings, events.calibrated) if calibrated else {}
            try:
                digests = _write_ranks(plan, ranges, directory, events.written)
            except OSError as problem:
                raise OutputError(
                    f"{self.directory}: cannot be written ({problem.strerror})", write_hint(problem)
                ) from None
            if calibrated:
                write_ranges(ranges, directory / ACT_RANGES)
            (directory / CONFIG).write_text(json.dumps(_config(plan), indent=4), encoding="utf-8")
            if plan.tokenizer is not None:
                plan.tokenizer.write(directory / TOKENIZER_DIRECTORY)
            events.inspect(plan, directory, ranges)
            plan.inputs()  # reads what no rule has used
            plan.files.check()
            plan.source.map_files(False)
        return digests


def run_conversion(
    plan: ConversionPlan,
    output: Path,
    *,
    force: bool = False,
    progress: Progress = lambda count: None,
    calibrated: Progress = lambda layers: None,
    inspect: Inspect = lambda plan, directory, ranges: None,
) -> Manifest:
    """Write the checkpoint directory: config.json, rank files, tokenizer files and the manifest.

    Args:
        force: replace what exists; allow an INT8 KV cache that damages the answers.
        progress: called with the bytes written since the last call.
        calibrated: called with the number of layers calibrated since the last call.
        inspect: called with the directory when all but the manifest is written; may add files.

    Raises:
        OutputError: if `output` exists and `force` is not set, or cannot be written.
        SourceError: if weights are not finite, or change during the conversion.
        CheckpointError: if weights overflow float16 during the conversion.
        InputError: if an INT8 KV cache would damage the answers and `force` is not set.
    """
    stage = CheckpointStage(plan, output)
    stage.check(force=force)
    events = BuildEvents(written=progress, calibrated=calibrated, inspect=inspect)
    return stage.make(force=force, events=events)


def check_kv_cache(plan: ConversionPlan, *, force: bool) -> None:
    """Refuse an INT8 KV cache that the model's k_proj biases would spoil, unless `force` is set.

    Raises:
        InputError: naming the layers.
    """
    if plan.settings.kv_cache == "int8" and not force:
        check_int8_kv_cache(plan.source)


def _write_ranks(plan: ConversionPlan, ranges: Ranges, directory: Path, progress: Progress) -> dict[str, str]:
    """Write every rank file in one pass over the source; returns their digests."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(SafetensorsWriter(directory / rank_weights(rank), specs))
            for rank, specs in enumerate(plan.ranks)
        ]
        for rule in _examined(plan):
            stage = [writers[rank] for rank in plan.mapping.stage_ranks(rule.stage)]
            targets = [stage] if rule.replicated else [[writer] for writer in stage]
            tensors = [plan.source.tensor(name) for name in rule.sources]
            large = [name for name in rule.sources if plan.source.spec(name).nbytes > _LARGE_BYTES]

            def written(count: int, large: Iterable[str] = large) -> None:
                progress(count)
                plan.files.check()
                for name in large:
                    plan.source.finish(name)  # what is still needed of it is mapped again

            for target, parts in zip(targets, rule.produce(tensors, ranges), strict=True):
                for name in rule.specs:
                    write_to_all(target, name, parts[name], rule.via, written)
            for name in rule.sources:
                plan.source.finish(name)
    return {writer.path.name: writer.digest() for writer in writers}


def _examined(plan: ConversionPlan) -> Iterator[Rule]:
    """Yield the rules after a check of their sources. A thread reads the sources of the next rule ahead."""

    def examine(rule: Rule) -> Rule:
        plan.files.check()
        for name in rule.sources:
            largest = plan.source.examine(name)
            if plan.precision.float16_anywhere and largest >= FLOAT16_OVERFLOW:
                count = plan.source.count_beyond(name, FLOAT16_OVERFLOW)
                raise CheckpointError(
                    (
                        f"{plan.source.directory}: {count} values of tensor {name!r} overflow float16 (largest "
                        f"{largest:.3g})"
                    ),
                    _overflow_hint(plan.precision),
                )
        return rule

    with ThreadPoolExecutor(1) as pool:
        coming = None
        for rule in plan.rules:
            ready, coming = coming, pool.submit(examine, rule)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def _overflow_hint(precision: Precision) -> str:
    if precision.through_float16:
        return "SmoothQuant and INT8 KV caches compute in it: use quant int8_wo or none with dtype bfloat16"
    return "use dtype bfloat16"


def _rules(
    source: HfModel, settings: CheckpointRecipe, mapping: RankMapping, precision: Precision
) -> tuple[Rule, ...]:
    splits = {"none": Split.REPLICATED, "vocab": Split.VOCAB, "hidden": Split.ROW}
    book = RuleBook(source.config, mapping, precision, embedding=splits[settings.embedding_sharding])
    return tuple(book.rules(tied=source.tied))


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

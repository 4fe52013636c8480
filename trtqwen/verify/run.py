"""`trtqwen verify`: the whole check of a checkpoint, or of an export of one, against the model it was made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trtqwen.checkpoint.config import CheckpointConfig, read_checkpoint_config
from trtqwen.checkpoint.convert import ConversionPlan, plan_conversion
from trtqwen.diagnostics import Diagnostic, InputError
from trtqwen.hf.checks import read_model
from trtqwen.hf.config import load_config
from trtqwen.hf.source import HfModel
from trtqwen.recipe import CheckpointRecipe, Int8LayoutChoice
from trtqwen.verify.compare import Candidate, Comparison, Progress, compare
from trtqwen.verify.exported import ExportedModel, is_export
from trtqwen.verify.plot import plot_comparison
from trtqwen.verify.ranks import CheckpointRanks
from trtqwen.verify.reference import TransformersReference, transformers_reference
from trtqwen.verify.structure import config_problems, implied_recipe, stored_layout, tensor_problems
from trtqwen.verify.verdict import (
    FLOAT,
    Thresholds,
    implausible,
    plausible_perplexity,
    problems,
    thresholds,
)

REPORT, PLOT = "verify.json", "verify.png"


@dataclass(frozen=True)
class Verification:
    """The result.

    Attributes:
        checkpoint: the directory, also that of an export.
        precision: such as `W8A16 bfloat16, INT8 KV cache`.
        comparison: None if the files do not match the checkpoint's config.
        problems: values beyond the limits, one sentence each, the most likely cause first.
        reference: results of transformers, if requested.
    """

    checkpoint: Path
    model: Path
    precision: str
    thresholds: Thresholds
    comparison: Comparison | None
    problems: list[str]
    reference: TransformersReference | None = None

    @property
    def diagnostic(self) -> Diagnostic | None:
        """The first problem; None if the checkpoint agrees with its model."""
        if not self.problems:
            return None
        rest = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return Diagnostic(f"{self.checkpoint}: {self.problems[0]}{rest}", self._hint)

    @property
    def _hint(self) -> str:
        if self.reference is not None and self.reference.problems:
            return "report it with the model's config.json and tokenizer files: trtqwen reads them differently"
        if self.comparison is not None and implausible(self.comparison, self.thresholds):
            return "take all files from one model, or pass --max-model-perplexity for a model that is not trained"
        again = "export the checkpoint again" if is_export(self.checkpoint) else "convert the model again"
        return again + ("" if self.precision in FLOAT else ", or in a higher precision")

    def as_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            "ok": not self.problems,
            "checkpoint": str(self.checkpoint),
            "model": str(self.model),
            "precision": self.precision,
            "problems": self.problems,
            "thresholds": asdict(self.thresholds),
            "reference": None if self.reference is None else asdict(self.reference),
            **(self.comparison.as_json() if self.comparison else {}),
        }


def verify(
    checkpoint: Path,
    model: Path,
    samples: Sequence[list[int]],
    *,
    int8_layout: Int8LayoutChoice | None = None,
    limits: dict[str, float] | None = None,
    texts: Sequence[str] | None = None,
    progress: Progress = lambda layers: None,
) -> Verification:
    """Check names and shapes, then run the checkpoint and the model. Uses CUDA if it is there.

    Args:
        checkpoint: of TensorRT-LLM, or a directory that `export` wrote.
        samples: token ids, at least two each.
        int8_layout: of INT8 weight-only matrices; None takes the manifest's word.
        limits: thresholds to replace, by name.
        texts: have transformers load the model too, whole, and compare its perplexity, the ids of these texts and
            rendered chats; None leaves it out.

    Raises:
        InputError: if model or checkpoint cannot be read, or are not of a kind that trtqwen verifies.
    """
    read_model(model)  # what `convert` would refuse is no model to compare with
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = (_export if is_export(checkpoint) else _checkpoint)(checkpoint, model, int8_layout, device)
    plausible = {"model_perplexity": plausible_perplexity(samples, load_config(model).vocab_size)}
    allowed = Thresholds(**{**asdict(thresholds(subject.recipe)), **plausible, **(limits or {})})
    found, comparison = subject.problems, None
    if subject.candidate is not None and subject.plan is not None:
        comparison = compare(subject.plan, subject.candidate, samples, device, progress)
        found = problems(comparison, allowed, float16=subject.recipe.dtype == "float16")
    theirs = None
    if texts is not None and comparison is not None:
        theirs = transformers_reference(model, samples, texts, comparison.head.model_perplexity)
        found = [*theirs.problems, *found]
    return Verification(checkpoint, model, subject.precision, allowed, comparison, found, theirs)


@dataclass(frozen=True)
class _Subject:
    """The subject of the verification.

    Attributes:
        recipe: settings whose conversion of the model would give it, or would have its precision.
        problems: of its config.json and its tensors' names and shapes.
        plan, candidate: the conversion of the model, and what is compared with it; None if there are problems.
    """

    precision: str
    recipe: CheckpointRecipe
    problems: list[str]
    plan: ConversionPlan | None
    candidate: Candidate | None


def _checkpoint(directory: Path, model: Path, int8_layout: Int8LayoutChoice | None, device: torch.device) -> _Subject:
    config = read_checkpoint_config(directory)
    layout = stored_layout(directory, int8_layout)
    recipe = implied_recipe(config, layout, load_config(model))
    if found := config_problems(config, HfModel(model, recipe.yarn_factor).config):
        return _Subject(_precision(config), recipe, found, None, None)
    plan, ranks = plan_conversion(model, recipe), CheckpointRanks(directory, layout, device)
    if found := tensor_problems(plan, ranks.readers):
        return _Subject(_precision(config), recipe, found, None, None)
    return _Subject(_precision(config), recipe, [], plan, ranks)


def _export(directory: Path, model: Path, int8_layout: Int8LayoutChoice | None, device: torch.device) -> _Subject:
    if int8_layout is not None:
        what = f"{directory}: is no TensorRT-LLM checkpoint, so it has no INT8 layout"
        raise InputError(what, "leave out --int8-layout")
    exported = ExportedModel(directory, device)
    recipe = exported.recipe(load_config(model))
    found = exported.problems(HfModel(model, recipe.yarn_factor).config)
    if found:
        return _Subject(exported.precision, recipe, found, None, None)
    return _Subject(exported.precision, recipe, [], plan_conversion(model, recipe), exported)


def write_report(verification: Verification, directory: Path) -> None:
    """Write verify.json and, if a comparison was made, verify.png."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(verification.as_json(), indent=2, ensure_ascii=False)
    (directory / REPORT).write_text(text + "\n", encoding="utf-8")
    if verification.comparison is not None:
        title = f"{verification.checkpoint.name}: {verification.precision}"
        plot_comparison(verification.comparison, verification.thresholds, title, directory / PLOT)


def _precision(config: CheckpointConfig) -> str:
    quantization = config.quantization
    name = f"{quantization.quant_algo} {config.dtype}" if quantization.quant_algo else str(config.dtype)
    return name + (f", {quantization.kv_cache_quant_algo} KV cache" if quantization.kv_cache_quant_algo else "")

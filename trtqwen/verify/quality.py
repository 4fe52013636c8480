"""The loss of an INT8 checkpoint: `quality.json` and `quality.png` in its directory."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtqwen.checkpoint.convert import ConversionPlan
from trtqwen.quantize.outliers import BIAS_RATIO, bias_norms, channel_outliers
from trtqwen.quantize.smoothquant import ActivationRange
from trtqwen.quantize.texts import HELDOUT
from trtqwen.verify.plot import NO_MATPLOTLIB, can_plot, plot_quality

if TYPE_CHECKING:
    from trtqwen.verify.compare import Comparison

QUALITY, QUALITY_PLOT = "quality.json", "quality.png"
TOKENS, LEAST_TOKENS = 2048, 128
_CPU_PRODUCTS = 1_600_000_000_000  # weights times tokens: some minutes on two cores, for any model size
_WORST = 5
Progress = Callable[[int], None]


def has_int8(plan: ConversionPlan) -> bool:
    """Whether there is a loss to report."""
    return plan.settings.quant != "none" or plan.settings.kv_cache == "int8"


def quality_report(
    plan: ConversionPlan,
    directory: Path,
    ranges: Mapping[str, ActivationRange],
    progress: Progress = lambda layers: None,
) -> None:
    """Measure a written checkpoint against its model on held-out text, as `trtqwen verify` does, and write it down.

    If the model has no tokenizer, or PyTorch is not installed, the report says so instead.

    Args:
        directory: config.json and rank files; the manifest need not be there yet.
        ranges: activation ranges of the calibration; empty if there was none.
        progress: called with the number of layers done since the last call.
    """
    norms, outliers = bias_norms(plan.source), channel_outliers(ranges)
    median = statistics.median(norms)
    obstacle = _obstacle(plan)
    comparison = None if obstacle else _measure(plan, directory, progress)
    content = {
        "quant": plan.settings.quant,
        "kv_cache": plan.settings.kv_cache,
        "not_measured": obstacle,
        "not_plotted": None if can_plot() else NO_MATPLOTLIB,
        **({} if comparison is None else _measurement(comparison)),
        "activation_outliers": outliers,
        "k_proj_bias_norms": norms,
        "k_proj_bias_ratio": max(norms) / median if median else None,
    }
    (directory / QUALITY).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not can_plot():
        return
    title = f"not measured: {obstacle}"
    if comparison is not None:
        head = comparison.head
        title = f"perplexity {head.perplexity_increase:+.2%}, top-1 agreement {head.top1_agreement:.1%}"
    layers = () if comparison is None else comparison.layers
    plot_quality(layers, outliers, norms, BIAS_RATIO * median, title, directory / QUALITY_PLOT)


def _obstacle(plan: ConversionPlan) -> str | None:
    """Return why nothing can be measured, or None."""
    if plan.tokenizer is None:
        return "the model has no tokenizer"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    return None


def _measure(plan: ConversionPlan, directory: Path, progress: Progress) -> Comparison:
    import torch  # writing a weight-only checkpoint does not need it

    from trtqwen.verify.compare import compare
    from trtqwen.verify.ranks import CheckpointRanks
    from trtqwen.verify.samples import read_samples

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = CheckpointRanks(directory, plan.settings.int8_layout, device)
    tokens = (
        TOKENS if device.type == "cuda" else min(TOKENS, max(LEAST_TOKENS, _CPU_PRODUCTS // plan.source.num_values))
    )
    return compare(plan, ranks, read_samples(plan.source.directory, HELDOUT, tokens), device, progress)


def _measurement(comparison: Comparison) -> dict[str, Any]:
    content = comparison.as_json()
    worst = sorted(comparison.layers, key=lambda layer: -max(layer.attention_error, layer.mlp_error))
    return {
        "text": HELDOUT.name,
        "tokens": comparison.head.tokens,
        "perplexity_model": content["head"]["model_perplexity"],
        "perplexity_checkpoint": content["head"]["checkpoint_perplexity"],
        "perplexity_increase": content["head"]["perplexity_increase"],
        "top1_agreement": content["head"]["top1_agreement"],
        "kl_mean": content["head"]["kl_mean"],
        "worst_layers": [layer.layer for layer in worst[:_WORST]],
        "layers": content["layers"],
    }

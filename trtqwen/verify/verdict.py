"""Limits for the difference between a checkpoint and its model in each precision, and the verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtqwen.recipe import CheckpointRecipe

if TYPE_CHECKING:  # the plots need the limits where PyTorch is not installed
    from trtqwen.verify.compare import Comparison, LayerComparison

FLOAT16_MAX = 65504.0
_FEW_TOKENS = 256


@dataclass(frozen=True)
class Thresholds:
    """The limits. Measured on the bundled model, correct checkpoints stay below a half of each.

    Attributes:
        attention_error, mlp_error: local errors of a layer's blocks, relative.
        kl: mean KL divergence, nats.
        top1: least share of tokens whose most probable next token agrees.
        perplexity: relative increase.
        max_activation: largest magnitude in a float16 checkpoint: half of what float16 holds, because other texts
            go higher than this one.
        model_perplexity: of the model itself: above it the model predicts worse than the frequencies of the texts'
            own tokens do, so its config or weights are not those it was trained with.
    """

    attention_error: float
    mlp_error: float
    kl: float
    top1: float
    perplexity: float
    max_activation: float = FLOAT16_MAX / 2
    model_perplexity: float = math.inf


FLOAT = {
    "float32": Thresholds(1e-4, 1e-4, 1e-6, 0.999, 0.001),
    "float16": Thresholds(2e-3, 2e-3, 1e-4, 0.99, 0.002),
    "bfloat16": Thresholds(1e-2, 1e-2, 2e-3, 0.97, 0.005),
}
_WEIGHT_ONLY = Thresholds(0.04, 0.04, 5e-3, 0.96, 0.01)
_PER_TOKEN = Thresholds(0.08, 0.08, 0.02, 0.94, 0.02)
_STATIC = Thresholds(0.2, 0.2, 0.05, 0.9, 0.05)
_INT8_KV = Thresholds(0.3, 0, 0.05, 0.1, 0.05)  # on top of the others; keys and values touch attention alone


def thresholds(recipe: CheckpointRecipe) -> Thresholds:
    """The limits for the precision of a checkpoint made with these settings (dtype not `auto`)."""
    if recipe.quant == "int8_sq":
        base = _PER_TOKEN if recipe.per_token else _STATIC
    else:
        base = _WEIGHT_ONLY if recipe.quant == "int8_wo" else FLOAT[recipe.dtype]
    if recipe.kv_cache == "int8":
        return replace(
            base,
            attention_error=base.attention_error + _INT8_KV.attention_error,
            kl=base.kl + _INT8_KV.kl,
            top1=base.top1 - _INT8_KV.top1,
            perplexity=base.perplexity + _INT8_KV.perplexity,
        )
    return base


def plausible_perplexity(samples: Sequence[list[int]], vocab_size: int) -> float:
    """The perplexity of the best unigram model of these tokens.

    Of few tokens, which that model would know by heart, ten times the perplexity of drawing at random.
    """
    counts = Counter(token for sample in samples for token in sample[1:])
    total = sum(counts.values())
    if total < _FEW_TOKENS:
        return 10.0 * vocab_size
    return math.exp(-sum(count * math.log(count / total) for count in counts.values()) / total)


def problems(comparison: Comparison, limits: Thresholds, *, float16: bool) -> list[str]:
    """Return the values beyond the limits, one sentence each, the most likely cause first. NaN is beyond every limit.

    Args:
        float16: whether the checkpoint computes in float16.
    """
    head = comparison.head
    found = [f"tensor {name} holds infinities or NaNs" for name in comparison.non_finite]
    if implausible(comparison, limits):
        found.append(
            f"the model itself has a perplexity of {head.model_perplexity:.4g}, more than the frequencies of the "
            f"texts' tokens alone give ({limits.model_perplexity:.4g}): config.json or weights are not those that it "
            "was trained with"
        )
    found += [f"{rows} rows of {name} are not the model's" for name, rows in comparison.differing_rows.items()]
    found += _layer_problems(comparison.layers, limits)
    if not head.kl_mean <= limits.kl:
        found.append(f"the next-token distributions differ by {head.kl_mean:.3g} nats (limit {limits.kl:g})")
    if not head.top1_agreement >= limits.top1:
        found.append(f"only {head.top1_agreement:.1%} of the next tokens agree (limit {limits.top1:.1%})")
    if not head.perplexity_increase <= limits.perplexity:
        found.append(f"perplexity rises by {head.perplexity_increase:.2%} (limit {limits.perplexity:.2%})")
    if float16:
        found += _overflows(comparison.layers, limits)
    return found


def implausible(comparison: Comparison, limits: Thresholds) -> bool:
    """Return whether the model predicts nothing, so that agreement with it is meaningless."""
    return not comparison.head.model_perplexity <= limits.model_perplexity


def _layer_problems(layers: tuple[LayerComparison, ...], limits: Thresholds) -> Iterator[str]:
    """Return one sentence for all layers, which names the worst one."""
    # Each block's error as a multiple of its limit.
    blocks = [
        (error / limit if error == error else float("inf"), layer.layer, block, error, limit)
        for layer in layers
        for block, error, limit in (
            ("attention", layer.attention_error, limits.attention_error),
            ("mlp", layer.mlp_error, limits.mlp_error),
        )
    ]
    bad = {layer for excess, layer, *_ in blocks if excess > 1}
    if bad:
        _, layer, block, error, limit = max(blocks)
        others = f"; {len(bad) - 1} more layers are beyond it" if len(bad) > 1 else ""
        yield f"layer {layer} is wrong: its {block} differs from the model's by {error:.3g} (limit {limit:g}){others}"


def _overflows(layers: tuple[LayerComparison, ...], limits: Thresholds) -> Iterator[str]:
    worst = max(layers, key=lambda layer: layer.max_activation)
    if worst.max_activation > limits.max_activation:
        yield (
            f"activations of layer {worst.layer} reach {worst.max_activation:.0f}, and float16 ends at "
            f"{FLOAT16_MAX:.0f} (limit {limits.max_activation:.0f}): use dtype bfloat16"
        )

"""Properties that make a model hard to quantize, from its weights and activation ranges."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtqwen.diagnostics import InputError
from trtqwen.hf.source import HfModel
from trtqwen.quantize.smoothquant import ActivationRange

# Qwen2.5-7B has k_proj biases 27 and 42 times the median in its first and last layer; TensorRT-LLM's one step for
# keys and values of a layer then is coarser than most values. Models without such layers stay below 3.
BIAS_RATIO = 8.0


def bias_norms(source: HfModel) -> list[float]:
    """L2 norm of each layer's k_proj bias; reads nothing else."""
    names = [f"model.layers.{layer}.self_attn.k_proj.bias" for layer in range(source.config.num_hidden_layers)]
    return [float(np.linalg.norm(source.tensor(name).astype(np.float64))) for name in names]


def check_int8_kv_cache(source: HfModel) -> None:
    """Refuse an INT8 KV cache where some layers' k_proj bias dwarfs the others'.

    Raises:
        InputError: naming the layers.
    """
    norms = np.array(bias_norms(source))
    ratios = norms / max(np.median(norms), np.finfo(np.float64).tiny)
    broken = [f"{ratios[layer]:.0f} (layer {layer})" for layer in np.flatnonzero(ratios > BIAS_RATIO)]
    if broken:
        raise InputError(
            (
                f"{source.directory}: k_proj biases are {', '.join(broken)} times the median of all "
                f"layers, where {BIAS_RATIO:g} is the limit for an INT8 KV cache"
            ),
            "leave kv_cache auto, or pass --force",
        )


def channel_outliers(ranges: Mapping[str, ActivationRange]) -> dict[str, float]:
    """Largest by median input channel of every linear layer, by Hugging Face module name."""
    return {
        module: float(span.x.max() / max(np.median(span.x), np.finfo(np.float32).tiny))
        for module, span in ranges.items()
    }

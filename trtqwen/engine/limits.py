"""Limits of the engines, checked before a checkpoint is written that an engine cannot run."""

from __future__ import annotations

from trtqwen.diagnostics import InputError
from trtqwen.engine.config import Backend
from trtqwen.hf.config import HfConfig
from trtqwen.recipe import Recipe

YARN_CONTEXTS = (32768, 40960)  # of the models whose cards advise YaRN: Qwen2.5 Instruct and QwQ
LARGEST_FACTOR = 4  # that their cards advise
TORCH_ROPE_SCALINGS = ("yarn", "linear")  # what trtqwen.nn.rotary computes


def check_computed(backend: Backend, config: HfConfig) -> None:
    """Refuse a model that an engine of this kind would refuse at its start.

    Raises:
        InputError: naming the field of config.json.
    """
    scaling = config.rope_scaling
    if backend == "torch" and scaling is not None and scaling["type"] not in TORCH_ROPE_SCALINGS:
        raise InputError(
            f"rope_scaling type {scaling['type']} is not computed by the torch engine",
            "use another backend, or a model without it",
        )
    if backend in ("vllm", "llmapi") and scaling is not None and "mscale" in scaling:
        raise InputError(
            f"rope_scaling has an attention factor of its own (attention_factor or mscale), which backend "
            f"{backend} does not compute",
            "use backend tensorrt_llm or torch",
        )


def check_context(recipe: Recipe, config: HfConfig) -> None:
    """Refuse requests that are longer than the model's context.

    Raises:
        InputError: with the hint.
    """
    length = recipe.engine.max_seq_len
    if length > config.context:
        raise InputError(
            f"engine.max_seq_len {length} exceeds {context_words(config)}", longer_context(recipe, config)
        )


def context_words(config: HfConfig) -> str:
    """Return the model's context in words, with its source."""
    if config.dense_context is not None and config.dense_context < config.max_position_embeddings:
        return (
            f"the {config.context} tokens up to which dual_chunk_attention_config is ordinary attention; "
            "TensorRT-LLM does not compute what lies beyond"
        )
    return f"the model's max_position_embeddings {config.context}"


def longer_context(recipe: Recipe, config: HfConfig) -> str:
    """Return the hint for a context that is too short."""
    lower = f"lower engine.max_seq_len to {config.context}"
    factor = needed_factor(recipe, config)
    stretchable = config.rope_scaling is None or recipe.checkpoint.yarn_factor is not None
    advised = config.native_context in YARN_CONTEXTS and factor <= LARGEST_FACTOR
    if config.dense_context is not None or not stretchable or not advised:
        return lower
    return f"{lower}, or stretch the context by checkpoint.yarn_factor: {factor}.0"


def needed_factor(recipe: Recipe, config: HfConfig) -> int:
    """Return the ratio of the recipe's context to the model's context without YaRN."""
    return max(1, -(-recipe.engine.max_seq_len // config.native_context))

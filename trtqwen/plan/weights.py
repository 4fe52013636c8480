"""Bytes of weights on one rank, from the model's sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import RankMatrices, rank_matrices
from trtqwen.hf.config import HfConfig
from trtqwen.recipe import CheckpointRecipe

_SCALE = 4  # SmoothQuant's and the KV cache's scales are float32


@dataclass(frozen=True)
class RankWeights:
    """Bytes of weights of one rank.

    Attributes:
        embedding: one row is read per token, so that it costs memory but no time.
        layers: the decoder layers of the rank's stage, with their norms, biases and scales, and the last norm.
        lm_head: its own copy even where the model ties it to the embedding; never quantized.
    """

    embedding: int
    layers: int
    lm_head: int

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.lm_head

    @property
    def read(self) -> int:
        """Bytes that each step reads."""
        return self.layers + self.lm_head


def rank_weights(config: HfConfig, settings: CheckpointRecipe, value_bytes: int, stage: int) -> RankWeights:
    """Weights as the engine holds them on each rank of a pipeline stage: INT8 matrices in one byte a value.

    Args:
        value_bytes: of everything that is not quantized.
    """
    mapping, hidden = RankMapping(settings.tp_size, settings.pp_size), config.hidden_size
    rows = -(-config.vocab_size // mapping.tp_size)
    shards = {"none": config.vocab_size * hidden, "vocab": rows * hidden}
    shards["hidden"] = shards["none"] // mapping.tp_size
    embedding = shards[settings.embedding_sharding] * value_bytes if stage == 0 else 0
    layers = _layer_bytes(config, settings, value_bytes)
    layers *= len(mapping.stage_layers(stage, config.num_hidden_layers))
    lm_head = 0
    if stage == mapping.pp_size - 1:
        layers += hidden * value_bytes
        lm_head = rows * hidden * value_bytes
    return RankWeights(embedding, layers, lm_head)


def _layer_bytes(config: HfConfig, settings: CheckpointRecipe, value_bytes: int) -> int:
    matrices = rank_matrices(config, settings.tp_size, tiled=settings.quant == "int8_wo")
    norms_and_bias = (2 * config.hidden_size + matrices.qkv[0]) * value_bytes
    kv_scale = _SCALE if settings.kv_cache == "int8" else 0
    if settings.quant == "none":
        return matrices.values * value_bytes + norms_and_bias + kv_scale
    if settings.quant == "int8_wo":
        scales = sum(out for out, _ in matrices.all) * value_bytes
        return matrices.values + scales + norms_and_bias + kv_scale
    return matrices.values + _smoothquant_scales(matrices, settings) * _SCALE + norms_and_bias + kv_scale


def _smoothquant_scales(matrices: RankMatrices, settings: CheckpointRecipe) -> int:
    """Scales of a layer: of weights, of what no norm smooths, of the norms' outputs, and of static activations."""
    outputs = sum(out if settings.per_channel else 1 for out, _ in matrices.all[1:])
    smoothers = matrices.dense[1] + matrices.proj[1]
    static = 0 if settings.per_token else len(matrices.all) + 2
    return matrices.qkv[0] + outputs + smoothers + 2 + static

"""`config.json` of a TensorRT-LLM checkpoint: written key for key as NVIDIA's Qwen2 converter (1.2) writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtqwen.artifact.names import CONFIG
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import local_kv_heads, rank_matrices
from trtqwen.diagnostics import CheckpointError, first_problem
from trtqwen.facts.names import Release
from trtqwen.facts.releases import release_facts
from trtqwen.hf.config import ARCHITECTURE, HfConfig
from trtqwen.recipe import DtypeChoice, EmbeddingSharding

Dtype = Literal["float16", "bfloat16", "float32"]
Ranks = Annotated[int, Field(gt=0, le=1024)]


class MappingConfig(BaseModel):
    """The `mapping` block, as far as trtqwen reads it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    world_size: Ranks = 1
    tp_size: Ranks = 1
    pp_size: Ranks = 1


class QuantConfig(BaseModel):
    """The `quantization` block, as far as trtqwen reads it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None


class CheckpointConfig(BaseModel):
    """The part of config.json that readers need. An absent key is an error, not TensorRT-LLM's silent default."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: Literal["Qwen2ForCausalLM"]
    dtype: Dtype
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    norm_epsilon: float
    rotary_base: float
    rotary_scaling: dict[str, Any] | None
    hidden_act: str
    logits_dtype: Literal["float32", "float16"] = "float32"
    use_parallel_embedding: bool
    embedding_sharding_dim: int
    mapping: MappingConfig
    quantization: QuantConfig

    @property
    def rank_mapping(self) -> RankMapping:
        return RankMapping(self.mapping.tp_size, self.mapping.pp_size)

    @property
    def local_heads(self) -> int:
        """Query heads of one rank."""
        return self.num_attention_heads // self.mapping.tp_size

    @property
    def local_kv_heads(self) -> int:
        """KV heads of one rank; see `shapes.local_kv_heads`."""
        return local_kv_heads(self, self.mapping.tp_size)

    @property
    def layer_values(self) -> int:
        """Weights in the linear layers of one layer on one rank."""
        return rank_matrices(self, self.mapping.tp_size).values

    @property
    def matrix_values(self) -> int:
        """Weights in the linear layers of one rank, without the embedding and the output layer."""
        return self.layer_values * self.num_hidden_layers // self.mapping.pp_size


def resolved_dtype(choice: DtypeChoice, hf: HfConfig) -> Dtype:
    """Return the dtype of unquantized tensors. As in NVIDIA's converter, `auto` is float16 for float32 models."""
    if choice != "auto":
        return choice
    return "bfloat16" if hf.torch_dtype == "bfloat16" else "float16"


def checkpoint_config(
    hf: HfConfig,
    dtype: Dtype,
    mapping: RankMapping,
    *,
    quantization: dict[str, Any],
    embedding_sharding: EmbeddingSharding,
    calibrated: bool,
    release: Release,
) -> dict[str, Any]:
    """Return the content of config.json, in NVIDIA's key order. NVIDIA's reader has wrong defaults for absent keys.

    Args:
        quantization: keys that differ from those of an unquantized checkpoint.
        calibrated: whether activation ranges were used: NVIDIA's two paths write the mapping differently.
    """
    content: dict[str, Any] = {
        "mlp_bias": False,
        "attn_bias": True,
        "rotary_base": hf.rope_theta,
        "rotary_scaling": hf.rope_scaling,
        "disable_weight_only_quant_plugin": False,
        "num_labels": 1,
        "use_logn_attn": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "moe": {
            "num_experts": 0,
            "shared_expert_intermediate_size": 0,
            "top_k": 0,
            "normalization_mode": 0,
            "sparse_mixer_epsilon": 0.01,
            "tp_mode": 0,
            "device_limited_n_group": 0,
            "device_limited_topk_group": 0,
            "device_limited_routed_scaling_factor": 1.0,
        },
        "architecture": ARCHITECTURE,
        "dtype": dtype,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_hidden_layers": hf.num_hidden_layers,
        "num_attention_heads": hf.num_attention_heads,
        "hidden_act": hf.hidden_act,
        "logits_dtype": "float32",
        "norm_epsilon": hf.rms_norm_eps,
        "runtime_defaults": None,
        "position_embedding_type": "rope_gpt_neox",
        "num_key_value_heads": hf.num_key_value_heads,
        "intermediate_size": hf.intermediate_size,
        "max_position_embeddings": hf.context,
        "mapping": {
            "world_size": mapping.world_size,
            "gpus_per_node": 8,
            "cp_size": 1,
            "tp_size": mapping.tp_size,
            "pp_size": mapping.pp_size,
            "moe_tp_size": mapping.tp_size,
            "moe_cluster_size": 1,
            "moe_ep_size": 1,
            "attn_tp_size": mapping.tp_size if calibrated else -1,
            "attn_cp_size": 1 if calibrated else -1,
            "cp_config": {},
            "enable_attention_dp": False,
            "enable_lm_head_tp_in_adp": False,
        },
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None,
            "mamba_ssm_cache_dtype": None,
            **quantization,
        },
        "use_parallel_embedding": embedding_sharding != "none",
        "embedding_sharding_dim": 1 if embedding_sharding == "hidden" else 0,
        "head_size": hf.head_size,
        "qk_layernorm": False,
        "rotary_embedding_dim": hf.head_size,
        "seq_length": hf.seq_length,
        "qwen_type": hf.model_type,
        "moe_intermediate_size": 0,
        "moe_shared_expert_intermediate_size": 0,
        "tie_word_embeddings": hf.tie_word_embeddings,
    }
    for section, keys in release_facts(release).unknown_checkpoint_keys.items():
        for key in keys:
            del (content[section] if section else content)[key]
    return content


def read_checkpoint_config(directory: Path) -> CheckpointConfig:
    """Read and check a checkpoint's config.json.

    Raises:
        CheckpointError: if it is missing, broken, or not a Qwen2 checkpoint.
    """
    path = directory / CONFIG
    try:
        return CheckpointConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise CheckpointError(f"{path}: is missing", "name a directory that `trtqwen convert` wrote") from None
    except ValidationError as problem:
        raise CheckpointError(f"{path}: {first_problem(problem)}", "convert the model again") from None
    except ValueError:
        raise CheckpointError(f"{path}: is not JSON", "convert the model again") from None

"""The memory use of each rank's GPU, and the number of sequences in its KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trtqwen.checkpoint.config import Dtype
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import local_kv_heads, rank_matrices
from trtqwen.facts.cards import card_facts
from trtqwen.hf.config import HfConfig
from trtqwen.plan.assumptions import assumptions
from trtqwen.plan.weights import RankWeights, rank_weights
from trtqwen.recipe import Recipe

GIB = 2**30
VALUE_BYTES: dict[Dtype, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
_TORCH_BYTES = 4  # the torch engine computes in float32, regardless of the checkpoint's dtype


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the card of each rank of one pipeline stage; on the host for the torch engine.

    Attributes:
        card: what CUDA reports; None on the host.
        context: CUDA's own, and NCCL's.
        activations: what TensorRT reserves for the largest step.
        buffers: logits, decoder and runtime.
        block: one block of the KV cache.
        kv_blocks: blocks of the KV cache: as many as fit on the rank that has least room.
    """

    card: int | None
    context: int
    weights: RankWeights
    activations: int
    buffers: int
    block: int
    kv_blocks: int

    @property
    def kv_pool(self) -> int:
        return self.block * self.kv_blocks

    @property
    def taken(self) -> int:
        """Bytes of everything but the KV cache."""
        return self.context + self.weights.total + self.activations + self.buffers

    @property
    def unused(self) -> int:
        """Bytes that are left on the card; negative if it is too small."""
        return 0 if self.card is None else self.card - self.taken - self.kv_pool


@dataclass(frozen=True)
class Concurrency:
    """How many requests of one length run at once on one replica; each has all its blocks from the start.

    Attributes:
        tokens: of one request, prompt and answer.
        sequences: requests.
        by_blocks: requests that the KV cache alone would hold.
    """

    tokens: int
    sequences: int
    by_blocks: int


def plan_memory(recipe: Recipe, config: HfConfig, dtype: Dtype) -> tuple[RankMemory, ...]:
    """The memory of a rank of each pipeline stage."""
    settings, engine = recipe.checkpoint, recipe.engine
    if recipe.host is None:
        return _host_memory(recipe, config)
    facts, value_bytes = assumptions(), VALUE_BYTES[dtype]
    context = facts.context_gib.one_rank if recipe.world_size == 1 else facts.context_gib.more_ranks
    tokens = step_tokens(recipe)
    kv_value = 1 if settings.kv_cache == "int8" else value_bytes
    mapping = RankMapping(settings.tp_size, settings.pp_size)
    ranks = [
        RankMemory(
            card=int(card_facts(recipe.host.card).usable_gib * GIB),
            context=int(context * GIB),
            weights=rank_weights(config, settings, value_bytes, stage),
            activations=max(
                tokens * activation_bytes(config, settings.tp_size, value_bytes),
                head_bytes(recipe, config, value_bytes) if stage == settings.pp_size - 1 else 0,
            ),
            buffers=buffer_bytes(recipe, config, last=stage == settings.pp_size - 1),
            block=engine.tokens_per_block * kv_token_bytes(config, mapping, stage, kv_value),
            kv_blocks=0,
        )
        for stage in range(settings.pp_size)
    ]
    fraction = recipe.serve.kv_cache_free_gpu_mem_fraction
    blocks = min(pool_blocks(rank.unused, fraction, rank.block) for rank in ranks)
    limit = recipe.serve.max_tokens_in_paged_kv_cache
    if limit is not None:
        blocks = min(blocks, limit // engine.tokens_per_block)
    return tuple(replace(rank, kv_blocks=blocks) for rank in ranks)


def step_tokens(recipe: Recipe) -> int:
    """Tokens of the largest step: trtllm-build clips max_num_tokens to what a full batch has."""
    engine = recipe.engine
    return min(engine.max_num_tokens, engine.max_batch_size * engine.max_seq_len)


def activation_bytes(config: HfConfig, tp_size: int, value_bytes: int) -> int:
    """Bytes per token of a step: one layer's, which all layers share.

    Fused gate and up, their product, queries with keys and values, and four copies of the hidden state.
    """
    matrices = rank_matrices(config, tp_size)
    return value_bytes * (3 * matrices.fc[0] + matrices.qkv[0] + 4 * config.hidden_size)


def head_bytes(recipe: Recipe, config: HfConfig, value_bytes: int) -> int:
    """Bytes while the logits are computed: a row of them for each sequence, and what the last layer's MLP has left.

    TensorRT gives the logits the place of one of the MLP's matrices; the other two and two copies of the hidden
    state keep theirs. Two public logs agree with this to 0.01 MiB: `assumptions.json` names them.
    """
    fc, _ = rank_matrices(config, recipe.checkpoint.tp_size).fc
    rows = recipe.engine.max_batch_size
    return value_bytes * (step_tokens(recipe) * 2 * (fc + config.hidden_size) + rows * config.vocab_size)


def buffer_bytes(recipe: Recipe, config: HfConfig, *, last: bool) -> int:
    """Bytes of runtime buffers; the last stage also has the logits that engine and decoder hold.

    With gather_context_logits that is those of a whole step of prompts, too.
    """
    facts, engine = assumptions(), recipe.engine
    if not last:
        return facts.runtime_buffers_bytes
    value = 2 if engine.logits_dtype == "float16" else 4
    row = config.vocab_size * (value + (facts.logits_buffers - 1) * 4)
    prompts = step_tokens(recipe) * config.vocab_size * value if engine.gather_context_logits else 0
    return facts.runtime_buffers_bytes + int(engine.max_batch_size * row) + prompts


def kv_token_bytes(config: HfConfig, mapping: RankMapping, stage: int, value_bytes: int) -> int:
    """Bytes of one token's keys and values on each rank of a stage."""
    layers = len(mapping.stage_layers(stage, config.num_hidden_layers))
    return 2 * layers * local_kv_heads(config, mapping.tp_size) * config.head_size * value_bytes


def pool_blocks(free: int, fraction: float, block: int) -> int:
    """KV cache blocks in this share of the free bytes."""
    return max(0, int(free * fraction) // block)


def concurrency(recipe: Recipe, blocks: int, tokens: int) -> Concurrency:
    """How many requests of `tokens` tokens run at once on one replica."""
    by_blocks = blocks // -(-tokens // recipe.engine.tokens_per_block)
    return Concurrency(tokens, min(by_blocks, recipe.engine.max_batch_size), by_blocks)


def _host_memory(recipe: Recipe, config: HfConfig) -> tuple[RankMemory, ...]:
    """The torch engine's weights and KV cache; what a step needs besides them depends on PyTorch."""
    engine, settings = recipe.engine, recipe.checkpoint
    tokens = recipe.serve.max_tokens_in_paged_kv_cache or engine.max_batch_size * engine.max_seq_len
    mapping = RankMapping(settings.tp_size, settings.pp_size)
    plain = settings.model_copy(update={"quant": "none"})
    return tuple(
        RankMemory(
            card=None,
            context=0,
            weights=rank_weights(config, plain, _TORCH_BYTES, stage),
            activations=0,
            buffers=0,
            block=engine.tokens_per_block * kv_token_bytes(config, mapping, stage, _TORCH_BYTES),
            kv_blocks=tokens // engine.tokens_per_block,
        )
        for stage in range(settings.pp_size)
    )

"""Parallel layouts of a model on the host's GPUs: one engine over all of them, or several replicas."""

from __future__ import annotations

from dataclasses import dataclass

from trtqwen.checkpoint.checks import check_settings
from trtqwen.checkpoint.config import Dtype
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.diagnostics import CheckpointError
from trtqwen.hf.config import HfConfig
from trtqwen.plan.assumptions import assumptions
from trtqwen.plan.measured import shares
from trtqwen.plan.memory import RankMemory, concurrency, plan_memory
from trtqwen.plan.speed import Rate, Roofline, recipe_rates
from trtqwen.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """A parallel layout: the recipe with other values of tp_size, pp_size and replicas.

    Attributes:
        tokens: KV tokens of all replicas together.
        full_length: requests of max_seq_len tokens at once, on one replica.
        load: typical requests in flight over all replicas, as many as KV cache and max_batch_size let in.
        one_stream: tokens per second of a request that runs alone.
        throughput: answer tokens per second of all replicas under that load, while they read prompts too.
    """

    tp_size: int
    pp_size: int
    replicas: int
    tokens: int
    full_length: int
    load: int
    one_stream: Rate
    throughput: Rate

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def name(self) -> str:
        stages = f" PP{self.pp_size}" if self.pp_size > 1 else ""
        return f"TP{self.tp_size}{stages} x {self.replicas}"


def plan_layouts(recipe: Recipe, config: HfConfig, dtype: Dtype) -> tuple[Layout, ...]:
    """The recipe's own layout first, then the others that fill the host and hold a request of max_seq_len."""
    assert recipe.host is not None
    own = (recipe.checkpoint.tp_size, recipe.checkpoint.pp_size, recipe.serve.replicas)
    choices = [own]
    for tp_size in (1, 2, 4, 8):
        choice = (tp_size, 1, recipe.host.gpus // tp_size)
        if choice[2] and choice not in choices and _legal(recipe, config, tp_size):
            choices.append(choice)
    layouts = (_layout(recipe, config, dtype, *choice) for choice in choices)
    return tuple(layout for layout in layouts if layout is not None)


def typical_request(recipe: Recipe) -> tuple[int, int]:
    """Tokens of prompt and answer of a typical request, cut in proportion where max_seq_len is less."""
    request = assumptions().request
    whole = request.prompt_tokens + request.answer_tokens
    length = min(whole, recipe.engine.max_seq_len)
    answer = max(1, length * request.answer_tokens // whole)
    return max(1, length - answer), answer


def recipe_roofline(recipe: Recipe, config: HfConfig, dtype: Dtype, memory: tuple[RankMemory, ...]) -> Roofline:
    """The speed of one replica of a recipe at the data sheet's peaks."""
    settings = recipe.checkpoint
    return Roofline(
        config,
        RankMapping(settings.tp_size, settings.pp_size),
        recipe_rates(recipe, dtype, memory),
        shares(),
        sharded=settings.embedding_sharding != "none",
    )


def _legal(recipe: Recipe, config: HfConfig, tp_size: int) -> bool:
    settings = recipe.checkpoint.model_copy(update={"tp_size": tp_size, "pp_size": 1})
    try:
        check_settings(config, RankMapping(tp_size), settings)
    except CheckpointError:
        return False
    return True


def _layout(
    recipe: Recipe, config: HfConfig, dtype: Dtype, tp_size: int, pp_size: int, replicas: int
) -> Layout | None:
    """Return None if the layout cannot hold one request of max_seq_len."""
    settings = recipe.checkpoint.model_copy(update={"tp_size": tp_size, "pp_size": pp_size})
    changed = recipe.model_copy(update={"checkpoint": settings})
    memory = plan_memory(changed, config, dtype)
    full_length = concurrency(changed, memory[0].kv_blocks, recipe.engine.max_seq_len).sequences
    if full_length == 0:
        return None
    prompt, answer = typical_request(recipe)
    sequences = concurrency(changed, memory[0].kv_blocks, prompt + answer).sequences
    speed = recipe_roofline(changed, config, dtype, memory)
    return Layout(
        tp_size=tp_size,
        pp_size=pp_size,
        replicas=replicas,
        tokens=replicas * memory[0].kv_blocks * recipe.engine.tokens_per_block,
        full_length=full_length,
        load=replicas * sequences,
        one_stream=speed.generation(1, prompt + answer).rate,
        throughput=speed.throughput(sequences, prompt, answer).rate.times(replicas),
    )

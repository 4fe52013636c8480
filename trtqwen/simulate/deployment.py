"""A recipe in the simulator: the limits of the scheduler and the cost of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import rank_matrices
from trtqwen.diagnostics import InputError
from trtqwen.executor.config import context_share
from trtqwen.executor.scheduler import SchedulerConfig
from trtqwen.facts.cards import card_facts
from trtqwen.hf.config import HfConfig
from trtqwen.plan.assumptions import Link, assumptions
from trtqwen.plan.layouts import recipe_roofline
from trtqwen.plan.plan import Plan, model_config, plan_recipe
from trtqwen.plan.speed import recipe_rates
from trtqwen.recipe import Recipe
from trtqwen.simulate.corrections import Precision
from trtqwen.simulate.cost import CostModel
from trtqwen.simulate.engine import VirtualEngine

_PRECISIONS: dict[str, Precision] = {"none": "float16", "int8_sq": "int8", "int8_wo": "int8_wo"}


@dataclass(frozen=True)
class Deployment:
    """A recipe that can be simulated.

    Attributes:
        limits: of the scheduler of each replica.
        overlap: whether a step is scheduled while the one before runs.
        link: the likely one between the cards of a replica.
    """

    recipe: Recipe
    config: HfConfig
    plan: Plan
    cost: CostModel
    limits: SchedulerConfig
    overlap: bool
    link: Link

    def engines(self) -> list[VirtualEngine]:
        """Fresh replicas."""
        return [
            VirtualEngine(self.limits, self.cost.forecast, overlap=self.overlap)
            for _ in range(self.recipe.serve.replicas)
        ]


def deploy(recipe: Recipe, model: Path | None = None) -> Deployment:
    """Make the deployment of a recipe.

    Args:
        model: Hugging Face directory whose sizes count instead of those of the recipe's `model`.

    Raises:
        InputError: if the recipe names no card or no model, or does not fit.
    """
    if recipe.host is None:
        raise InputError(
            f"{recipe.name}: names no card, whose rates a simulation needs",
            "pass --set host.card=h100-sxm, or add the section host with card and gpus",
        )
    plan, config = plan_recipe(recipe, model), model_config(recipe, model)
    for finding in plan.findings:
        if finding.level == "error":
            raise InputError(f"{recipe.name}: {finding.what}", finding.hint)
    card, settings = card_facts(recipe.host.card), recipe.checkpoint
    link = assumptions().links_of(peer_to_peer=card.peer_to_peer).typical
    cost = CostModel(
        config,
        RankMapping(settings.tp_size, settings.pp_size),
        recipe_rates(recipe, plan.dtype, plan.memory),
        recipe_roofline(recipe, config, plan.dtype, plan.memory),
        card=recipe.host.card,
        engine=recipe.engine.backend,
        precision=_PRECISIONS[settings.quant],
        link=link,
    )
    overlap = recipe.serve.overlap if recipe.engine.backend == "torch" else True
    return Deployment(recipe, config, plan, cost, _limits(recipe, config, plan), overlap, link)


def _limits(recipe: Recipe, config: HfConfig, plan: Plan) -> SchedulerConfig:
    engine, serve = recipe.engine, recipe.serve
    # vLLM knows no other policy.
    policy = "max_utilization" if engine.backend == "vllm" else serve.batch_scheduler_policy
    checkpoint = recipe.checkpoint
    values = rank_matrices(config, checkpoint.tp_size).values * config.num_hidden_layers // checkpoint.pp_size
    return SchedulerConfig(
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens,
        max_seq_len=engine.max_seq_len,
        tokens_per_block=engine.tokens_per_block,
        num_blocks=plan.memory[0].kv_blocks,
        vocab_size=config.vocab_size,
        batch_scheduler_policy=policy,
        enable_chunked_context=serve.enable_chunked_context,
        enable_kv_cache_reuse=serve.enable_kv_cache_reuse,
        max_queue_size=serve.max_queue_size,
        context_share=context_share(values) if engine.backend == "torch" else 0,
    )

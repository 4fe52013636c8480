"""The highest token rate that a card allows for a model. A measured rate above it is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from trtqwen.checkpoint.config import resolved_dtype
from trtqwen.checkpoint.shapes import rank_matrices
from trtqwen.diagnostics import TrtQwenError
from trtqwen.facts.cards import card_facts
from trtqwen.facts.names import CardName
from trtqwen.hf.config import HfConfig
from trtqwen.plan.memory import VALUE_BYTES
from trtqwen.plan.weights import rank_weights
from trtqwen.recipe import CheckpointRecipe


class ImpossibleRate(TrtQwenError):
    """A measured rate is higher than the hardware allows."""


@dataclass(frozen=True)
class Bound:
    """Output tokens per second that no engine can pass, without speculative decoding.

    Attributes:
        bandwidth: each step reads all weights once and makes one token for each open request.
        compute: each token takes two operations for each value of the matrices.
    """

    bandwidth: float
    compute: float

    @property
    def rate(self) -> float:
        return min(self.bandwidth, self.compute)


def bound(
    config: HfConfig, settings: CheckpointRecipe, card: CardName, *, replicas: int, concurrency: int | None
) -> Bound:
    """The bound of a deployment.

    Args:
        settings: precision, and how many cards one replica has.
        concurrency: requests open at once; None bounds by compute alone, as an open loop may have any number.
    """
    facts = card_facts(card)
    nbytes = VALUE_BYTES[resolved_dtype(settings.dtype, config)]
    read = settings.tp_size * sum(
        rank_weights(config, settings, nbytes, stage).read for stage in range(settings.pp_size)
    )
    cards = settings.tp_size * settings.pp_size
    step = read / (cards * facts.bandwidth_gb_per_s * 1e9)
    values = settings.tp_size * rank_matrices(config, settings.tp_size).values * config.num_hidden_layers
    values += config.vocab_size * config.hidden_size
    peak = facts.int8_tops if settings.quant == "int8_sq" else facts.float16_tflops
    compute = replicas * cards * peak * 1e12 / (2 * values)
    return Bound(compute if concurrency is None else concurrency / step, compute)


def check_rate(measured: float, limit: Bound, what: str) -> None:
    """Refuse a rate above the bound.

    Raises:
        ImpossibleRate: with both numbers.
    """
    if measured > limit.rate:
        raise ImpossibleRate(
            f"{measured:,.0f} output tokens/s were measured, but {what} cannot make more than {limit.rate:,.0f}",
            "check that card, recipe and address belong together and that the server counts tokens, not characters",
        )

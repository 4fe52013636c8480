"""Bounds and forecasts of a replica's speed.

A bound is the time of the slowest resource at its peak; nothing is faster. A forecast overlaps compute and memory,
adds the communication of the GPUs, and multiplies the speed by the share that measurements reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trtqwen.checkpoint.config import Dtype
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import rank_matrices
from trtqwen.facts.cards import card_facts
from trtqwen.hf.config import HfConfig
from trtqwen.plan.assumptions import Link, Links, Share, assumptions
from trtqwen.plan.memory import VALUE_BYTES, RankMemory, step_tokens
from trtqwen.recipe import Recipe


class Span(NamedTuple):
    """The low and the high end of a quantity."""

    low: float
    high: float


@dataclass(frozen=True)
class Step:
    """Seconds of some work of a replica at the data sheet's rates.

    Attributes:
        matrices: the products with weights.
        attention: the products of queries with keys and values.
        bandwidth: reading weights and KV cache.
        link: all-reduces, the gather of the logits and sends between stages, on a link that none exceeds.
        exchange: the same on the fast and on the slow of the likely links.
        headroom: by how much compute may be faster than the data sheet says.
    """

    matrices: float
    attention: float
    bandwidth: float
    link: float
    exchange: Span
    headroom: float

    @property
    def least(self) -> float:
        """Seconds that it takes at least."""
        return max((self.matrices + self.attention) / self.headroom, self.bandwidth, self.link)

    @property
    def nominal(self) -> Span:
        """Seconds before the share that measured points reach: with the fast link, with the slow one."""
        card = max(self.matrices + self.attention, self.bandwidth)
        return Span(card + self.exchange.low, card + self.exchange.high)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        resources = {
            "compute": (self.matrices + self.attention) / self.headroom,
            "bandwidth": self.bandwidth,
            "all-reduce": self.link,
        }
        return max(resources.items(), key=lambda item: item[1])[0]

    def times(self, factor: float) -> Step:
        """Return this work multiplied by a factor."""
        return Step(
            self.matrices * factor,
            self.attention * factor,
            self.bandwidth * factor,
            self.link * factor,
            Span(self.exchange.low * factor, self.exchange.high * factor),
            self.headroom,
        )

    def beside(self, other: Step) -> Step:
        """Return both works in the same steps: context tokens share the reading of the weights with generation."""
        return Step(
            self.matrices + other.matrices,
            self.attention + other.attention,
            max(self.bandwidth, other.bandwidth),
            self.link + other.link,
            Span(self.exchange.low + other.exchange.low, self.exchange.high + other.exchange.high),
            self.headroom,
        )


class Forecast(NamedTuple):
    """What is likely: the median of what is measured, between the lowest and the highest."""

    low: float
    typical: float
    high: float


class Rate(NamedTuple):
    """Tokens per second: what nothing exceeds, and what is likely."""

    bound: float
    forecast: Forecast

    def times(self, factor: float) -> Rate:
        """Return the rate of several replicas."""
        return Rate(self.bound * factor, Forecast(*(factor * rate for rate in self.forecast)))


@dataclass(frozen=True)
class Work:
    """A step and the tokens that it makes or reads.

    Attributes:
        tokens: that count.
        share: what measured points of this kind reach of the nominal speed.
    """

    tokens: float
    step: Step
    share: Share

    @property
    def rate(self) -> Rate:
        """Tokens per second; the forecast spans measured shares and likely links, and stays below the bound."""
        bound, (fast, slow) = self.tokens / self.step.least, self.step.nominal
        forecast = (
            self.tokens / slow * self.share.low,
            self.tokens / (fast * slow) ** 0.5 * self.share.median,
            self.tokens / fast * self.share.high,
        )
        return Rate(bound, Forecast(*(min(rate, bound) for rate in forecast)))

    @property
    def seconds(self) -> Rate:
        """Seconds: at least, and likely, from the shortest to the longest."""
        bound, forecast = self.rate
        return Rate(self.tokens / bound, Forecast(*(self.tokens / rate for rate in reversed(forecast))))


@dataclass(frozen=True)
class Generation(Work):
    """One step of the generation phase: a token for each of these sequences.

    Attributes:
        sequences: on one replica.
        length: tokens of each, whose keys and values are read.
    """

    sequences: int
    length: int


@dataclass(frozen=True)
class Shares:
    """Shares of the nominal speed that measurements reach, by kind of work."""

    context: Share
    generation: Share
    throughput: Share


@dataclass(frozen=True)
class Rates:
    """The rates of a replica.

    Attributes:
        float_flops, matrix_flops: operations per second of one card: in attention and head, in the layers' matrices.
        read: bytes per second of one card.
        headroom: by how much compute may be faster.
        weights: bytes that the stages of one rank read in each step, together.
        kv_token: bytes of one token's keys and values, of all stages of one rank.
        value_bytes: of one value of the hidden state.
        step_tokens: tokens of the largest step.
        links: between the cards of a replica.
    """

    float_flops: float
    matrix_flops: float
    read: float
    headroom: float
    weights: float
    kv_token: float
    value_bytes: int
    step_tokens: int
    links: Links


def recipe_rates(recipe: Recipe, dtype: Dtype, memory: tuple[RankMemory, ...]) -> Rates:
    """The rates of a recipe at the data sheet's peaks."""
    assert recipe.host is not None
    card, facts = card_facts(recipe.host.card), assumptions()
    flops = card.float16_tflops * 1e12 * (facts.float32_rate if dtype == "float32" else 1)
    int8 = recipe.checkpoint.quant == "int8_sq"
    # Engines may sum float16 products in float16, which GeForce does twice as fast; bfloat16 has no such mode.
    sums = card.float16_sums if dtype == "float16" and not int8 else 1
    return Rates(
        float_flops=flops,
        matrix_flops=card.int8_tops * 1e12 if int8 else flops,
        read=card.bandwidth_gb_per_s * 1e9,
        headroom=facts.boost * sums,
        weights=sum(rank.weights.read for rank in memory),
        kv_token=sum(rank.block for rank in memory) / recipe.engine.tokens_per_block,
        value_bytes=VALUE_BYTES[dtype],
        step_tokens=step_tokens(recipe),
        links=facts.links_of(peer_to_peer=card.peer_to_peer),
    )


class Roofline:
    """The speed of one replica.

    Args:
        sharded: whether the embedding is divided over the ranks, which costs an all-reduce more.
    """

    def __init__(
        self, config: HfConfig, mapping: RankMapping, rates: Rates, shares: Shares, *, sharded: bool = False
    ) -> None:
        self._config, self._mapping, self._rates, self._shares = config, mapping, rates, shares
        self._sharded = sharded

    def generation(self, sequences: int, length: int) -> Generation:
        """A step for `sequences` sequences of `length` tokens each."""
        pairs = sequences * length
        step = self.step(sequences, pairs=pairs, rows=sequences, kv_tokens=pairs)
        return Generation(sequences, step, self._shares.generation, sequences, length)

    def largest_step(self, prompt: int) -> Work:
        """One step of max_num_tokens tokens, of prompts of `prompt` tokens."""
        tokens = self._rates.step_tokens
        prompt = min(prompt, tokens)
        step = self.step(tokens, pairs=tokens * prompt / 2, rows=tokens // prompt)
        return Work(tokens, step, self._shares.context)

    def prompt(self, tokens: int) -> Work:
        """One whole prompt, in as many steps as it needs."""
        steps = -(-tokens // self._rates.step_tokens)
        return Work(tokens, self.step(tokens, pairs=tokens**2 / 2, rows=1, steps=steps), self._shares.context)

    def throughput(self, sequences: int, prompt: int, answer: int) -> Work:
        """One request of many that are always in flight: its prompt is read and its answer written."""
        context, generation = self.largest_step(prompt), self.generation(sequences, prompt + answer // 2)
        reading = context.step.times(prompt / context.tokens)
        writing = generation.step.times(answer / sequences)
        return Work(answer, writing.beside(reading), self._shares.throughput)

    def step(self, tokens: int, *, pairs: float, rows: int, kv_tokens: float = 0, steps: int = 1) -> Step:
        """The seconds of some steps. Pipeline stages count one after the other.

        Args:
            pairs: of tokens with tokens they attend to.
            rows: tokens whose logits are computed.
        """
        config, tp, rates = self._config, self._mapping.tp_size, self._rates
        matrices = 2 * rank_matrices(config, tp).values * config.num_hidden_layers * tokens / rates.matrix_flops
        head = 2 * rows * config.vocab_size * config.hidden_size / tp / rates.float_flops
        width = config.num_attention_heads * config.head_size / tp
        links = rates.links
        return Step(
            matrices=matrices + head,
            attention=4 * pairs * width * config.num_hidden_layers / rates.float_flops,
            bandwidth=(steps * rates.weights + kv_tokens * rates.kv_token) / rates.read,
            link=self.exchange(links.bound, tokens, rows, steps),
            exchange=Span(*(self.exchange(link, tokens, rows, steps) for link in (links.fast, links.slow))),
            headroom=rates.headroom,
        )

    def exchange(self, link: Link, tokens: int, rows: int, steps: int = 1) -> float:
        """Seconds on a link.

        A ring moves 2 (p - 1) / p of what it reduces through each card, and half of that to gather.
        """
        tp, sends = self._mapping.tp_size, self._mapping.pp_size - 1
        reduces = 2 * self._config.num_hidden_layers + self._sharded if tp > 1 else 0
        collectives = reduces + 1 if tp > 1 else 0
        hidden = tokens * self._config.hidden_size * self._rates.value_bytes
        share = (tp - 1) / tp
        traffic = 2 * share * reduces * hidden + share * rows * self._config.vocab_size * self._rates.value_bytes
        latency = steps * (collectives + sends) * link.latency_us * 1e-6
        return latency + (traffic + sends * hidden) / (link.bus_gb_per_s * 1e9)

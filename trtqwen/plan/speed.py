"""How fast a replica can be at best: each step takes as long as its slowest resource, then the cards exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trtqwen.checkpoint.config import Dtype
from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.facts.cards import card_facts
from trtqwen.hf.config import HfConfig
from trtqwen.plan.assumptions import Link, assumptions
from trtqwen.plan.memory import VALUE_BYTES, RankMemory, step_tokens
from trtqwen.plan.weights import rank_matrices
from trtqwen.recipe import Recipe


class Span(NamedTuple):
    """What the fast and the slow end of the assumed links make of a quantity."""

    fast: float
    slow: float


@dataclass(frozen=True)
class Step:
    """Seconds of one step of a replica; cards compute, read and exchange at the rates of `assumptions.json`.

    Attributes:
        matrices: the products with weights.
        attention: the products of queries with keys and values.
        bandwidth: reading weights and KV cache at the card's full rate.
        exchange: all-reduces, the gather of the logits, and sends between pipeline stages.
    """

    matrices: float
    attention: float
    bandwidth: float
    exchange: Span

    @property
    def seconds(self) -> Span:
        card = max(self.matrices + self.attention, self.bandwidth)
        return Span(card + self.exchange.fast, card + self.exchange.slow)

    @property
    def bound(self) -> str:
        """What takes longest, at either end."""
        resources = {"compute": self.matrices + self.attention, "bandwidth": self.bandwidth}
        ends = [
            max({**resources, "all-reduce": exchange}.items(), key=lambda item: item[1]) for exchange in self.exchange
        ]
        return " or ".join(dict.fromkeys(name for name, _ in ends))


@dataclass(frozen=True)
class Generation:
    """One step of the generation phase: a token for each of these sequences.

    Attributes:
        sequences: on one replica.
        tokens: length of each, whose keys and values are read.
        rate: tokens per second, of one replica.
    """

    sequences: int
    tokens: int
    step: Step

    @property
    def rate(self) -> Span:
        return Span(*(self.sequences / seconds for seconds in self.step.seconds))


@dataclass(frozen=True)
class Context:
    """Reading prompts.

    Attributes:
        tokens: prompt tokens.
        rate: tokens per second, of one replica.
    """

    tokens: int
    step: Step

    @property
    def rate(self) -> Span:
        return Span(*(self.tokens / seconds for seconds in self.step.seconds))


class Roofline:
    """The speed of one replica of a recipe for the backend tensorrt_llm."""

    def __init__(self, recipe: Recipe, config: HfConfig, dtype: Dtype, memory: tuple[RankMemory, ...]) -> None:
        assert recipe.host is not None
        self._config = config
        self._mapping = RankMapping(recipe.checkpoint.tp_size, recipe.checkpoint.pp_size)
        self._step_tokens = step_tokens(recipe)
        self._value_bytes = VALUE_BYTES[dtype]
        self._sharded = recipe.checkpoint.embedding_sharding != "none"
        card, facts = card_facts(recipe.host.card), assumptions()
        self._float_rate = card.float16_tflops * 1e12 * facts.compute_efficiency
        if dtype == "float32":
            self._float_rate *= facts.float32_rate
        int8_rate = card.int8_tops * 1e12 * facts.compute_efficiency
        self._matrix_rate = int8_rate if recipe.checkpoint.quant == "int8_sq" else self._float_rate
        self._read_rate = card.bandwidth_gb_per_s * 1e9
        self._weights = sum(rank.weights.read for rank in memory)
        self._kv_token = sum(rank.block for rank in memory) / recipe.engine.tokens_per_block

    def generation(self, sequences: int, tokens: int) -> Generation:
        """A step for `sequences` sequences of `tokens` tokens each."""
        pairs = sequences * tokens
        return Generation(sequences, tokens, self._step(sequences, pairs=pairs, rows=sequences, kv_tokens=pairs))

    def largest_step(self, prompt: int) -> Context:
        """One step of max_num_tokens tokens, of prompts of `prompt` tokens."""
        tokens = self._step_tokens
        prompt = min(prompt, tokens)
        return Context(tokens, self._step(tokens, pairs=tokens * prompt / 2, rows=tokens // prompt))

    def prompt(self, tokens: int) -> Context:
        """One whole prompt, in as many steps as it needs."""
        steps = -(-tokens // self._step_tokens)
        return Context(tokens, self._step(tokens, pairs=tokens**2 / 2, rows=1, steps=steps))

    def _step(self, tokens: int, *, pairs: float, rows: int, kv_tokens: float = 0, steps: int = 1) -> Step:
        """Pipeline stages count one after the other.

        Args:
            pairs: of tokens with tokens they attend to.
            rows: tokens whose logits are computed.
        """
        config, tp = self._config, self._mapping.tp_size
        matrices = 2 * rank_matrices(config, tp).values * config.num_hidden_layers * tokens / self._matrix_rate
        head = 2 * rows * config.vocab_size * config.hidden_size / tp / self._float_rate
        width = config.num_attention_heads * config.head_size / tp
        links = assumptions().links
        return Step(
            matrices=matrices + head,
            attention=4 * pairs * width * config.num_hidden_layers / self._float_rate,
            bandwidth=(steps * self._weights + kv_tokens * self._kv_token) / self._read_rate,
            exchange=Span(*(self._exchange(link, tokens, rows, steps) for link in (links.fast, links.slow))),
        )

    def _exchange(self, link: Link, tokens: int, rows: int, steps: int) -> float:
        """Seconds; a ring moves 2 (p - 1) / p of what it reduces through each card, and half of that to gather."""
        tp, sends = self._mapping.tp_size, self._mapping.pp_size - 1
        reduces = 2 * self._config.num_hidden_layers + self._sharded if tp > 1 else 0
        collectives = reduces + 1 if tp > 1 else 0
        hidden = tokens * self._config.hidden_size * self._value_bytes
        share = (tp - 1) / tp
        traffic = 2 * share * reduces * hidden + share * rows * self._config.vocab_size * self._value_bytes
        latency = steps * (collectives + sends) * link.latency_us * 1e-6
        return latency + (traffic + sends * hidden) / (link.bus_gb_per_s * 1e9)

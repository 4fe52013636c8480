"""The time of a step: a bound and a forecast.

The bound is `plan.speed`'s: each resource alone, at its peak. The forecast adds the parts of a step one after the
other, as one stream of kernels runs them, each at the rate that `corrections.json` gives it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import rank_matrices
from trtqwen.hf.config import HfConfig
from trtqwen.plan.assumptions import Link
from trtqwen.plan.speed import Rates, Roofline
from trtqwen.simulate.corrections import EngineName, Precision, corrections
from trtqwen.simulate.engine import StepWork

_PRODUCTS = 4  # of a layer: queries with keys and values, output, gate with up, down


@dataclass(frozen=True)
class Totals:
    """Seconds that each resource is busy at least, over all steps of a replica."""

    compute: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0

    @property
    def least(self) -> float:
        """Seconds that the steps take at least, even if resources overlap perfectly."""
        return max(self.compute, self.bandwidth, self.link)

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        names = {"compute": self.compute, "bandwidth": self.bandwidth, "all-reduce": self.link}
        return max(names, key=lambda name: names[name])


class CostModel:
    """The cost of steps of one replica.

    Args:
        rates: of the data sheet, see `plan.speed.recipe_rates`.
        roofline: bounds of the same replica.
        card: as `corrections.json` names it.
        link: the likely link between the cards.
    """

    def __init__(
        self,
        config: HfConfig,
        mapping: RankMapping,
        rates: Rates,
        roofline: Roofline,
        *,
        card: str,
        engine: EngineName,
        precision: Precision,
        link: Link,
    ) -> None:
        facts = corrections()
        shares, own, products = facts.card(card), facts.engines[engine], facts.products[precision]
        tp, layers, hidden = mapping.tp_size, config.num_hidden_layers, config.hidden_size
        self._roofline, self._config, self._mapping, self._link = roofline, config, mapping, link
        self._nominal_read = rates.read
        self._read = rates.read * shares.read
        self._float = rates.float_flops * shares.float16
        eight_bit = precision in ("int8", "fp8")
        self._matrix = rates.matrix_flops * (shares.int8 if eight_bit else shares.float16) * products.compute
        self._products, self._own = products, own
        self._head_bytes = config.vocab_size // tp * hidden * rates.value_bytes
        self._layer_bytes = rates.weights - self._head_bytes
        self._token_flops = 2 * rank_matrices(config, tp).values * layers
        self._head_flops = 2 * config.vocab_size * hidden / tp
        self._pair_flops = 4 * config.num_attention_heads * config.head_size / tp * layers
        self._attention = rates.float_flops * own.context_attention
        self._kv_read = self._read * own.decode_attention
        self._kv_token = rates.kv_token
        moved = facts.elementwise.hidden * hidden + facts.elementwise.intermediate * config.intermediate_size / tp
        self._token_bytes = layers * rates.value_bytes * moved
        self._sampling = facts.sampling_us_per_row * 1e-6 * config.vocab_size / 152_064
        self._few_rows = self._read * products.read
        self._one_row = self._read * own.one_row.get(precision, products.one_row)
        self._kernels = _PRODUCTS * layers * products.kernel_us * 1e-6
        self._head_read = self._read * facts.head_read

    def forecast(self, work: StepWork) -> float:
        """Seconds that a step is likely to take."""
        read = self._one_row if work.tokens == 1 else self._few_rows
        products = self._kernels + _bend(
            self._layer_bytes / read, work.tokens * self._token_flops / self._matrix, self._products.sharpness
        )
        head = 0.0
        if work.rows:
            head = _bend(
                self._head_bytes / self._head_read,
                work.rows * self._head_flops / self._float,
                corrections().products["float16"].sharpness,
            )
        attention = work.pairs * self._pair_flops / self._attention
        attention += (work.kv_tokens + work.past_tokens) * self._kv_token / self._kv_read
        rest = work.tokens * self._token_bytes / self._read + work.rows * self._sampling
        return self._own.step_us * 1e-6 + products + head + attention + rest + self._exchange(work)

    def bound(self, works: Iterable[StepWork]) -> Totals:
        """Seconds that each resource needs at least for these steps."""
        compute = bandwidth = link = 0.0
        for work in works:
            step = self._roofline.step(
                work.tokens,
                pairs=work.pairs + work.kv_tokens,
                rows=work.rows,
                kv_tokens=work.kv_tokens + work.past_tokens,
            )
            compute += (step.matrices + step.attention) / step.headroom
            bandwidth += step.bandwidth - (0 if work.rows else self._head_bytes / self._nominal_read)
            link += step.link
        return Totals(compute, bandwidth, link)

    def _exchange(self, work: StepWork) -> float:
        return self._roofline.exchange(self._link, work.tokens, work.rows)


def _bend(reading: float, computing: float, sharpness: float) -> float:
    """Reading and computing overlap, but not perfectly where they take equally long."""
    return float((reading**sharpness + computing**sharpness) ** (1 / sharpness))

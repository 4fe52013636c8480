"""Public measurements, from `measured.json`, and their share of the nominal speed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from trtqwen.checkpoint.mapping import RankMapping
from trtqwen.checkpoint.shapes import local_kv_heads, rank_matrices
from trtqwen.hf.config import HfConfig
from trtqwen.plan.assumptions import Share, assumptions
from trtqwen.plan.speed import Rates, Roofline, Shares, Work

_FACTS = Path(__file__).with_name("measured.json")
_WHOLE = Share(low=1, median=1, high=1, points=0)
_STEP_TOKENS = 8192  # of the largest step, where a source does not say


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MeasuredCard(_Facts):
    """A card's data sheet: dense rates, float16 products summed in float32.

    Attributes:
        fp8_tflops, int8_tops: None where it has none.
    """

    usable_gib: float
    bandwidth_gb_per_s: float
    float16_tflops: float
    float16_sums: float
    fp8_tflops: float | None = None
    int8_tops: float | None = None


class Shape(_Facts):
    """Sizes of a model, as config.json names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = None
    tie_word_embeddings: bool = False

    @property
    def config(self) -> HfConfig:
        return HfConfig(
            model_type="any",
            max_position_embeddings=1 << 20,
            rms_norm_eps=1e-6,
            **self.model_dump(),
        )


class Point(_Facts):
    """One measurement.

    Attributes:
        kind: `generation`: tokens per second of one stream; `context`: prompt tokens per second; `throughput`: answer
            tokens per second with `in_flight` requests.
        precision: of the matrices.
        in_flight: over all replicas.
        tokens_per_s: as measured.
        similar: whether card and precision are like those of the recipes, so that it counts for the forecast; every
            point counts for the bound.
    """

    card: str
    system: str
    model: str
    precision: Literal["float16", "bfloat16", "fp8", "int8", "int8_wo"]
    kind: Literal["generation", "context", "throughput"]
    tp_size: int = 1
    replicas: int = 1
    prompt: int = 0
    answer: int = 0
    in_flight: int = 1
    tokens_per_s: float
    similar: bool = True
    source: str


class Measured(_Facts):
    """The content of the file."""

    sources: dict[str, str]
    cards: dict[str, MeasuredCard]
    models: dict[str, Shape]
    products: tuple[tuple[str, float, str], ...]  # card, TFLOP/s of large 16-bit products, source
    points: tuple[Point, ...]


@cache
def measured() -> Measured:
    """The measurements that ship with trtqwen."""
    return Measured.model_validate_json(_FACTS.read_text(encoding="utf-8"))


def point_rates(point: Point) -> Rates:
    """Return the rates of a point's card, from its data sheet."""
    card, config = measured().cards[point.card], measured().models[point.model].config
    flops = card.float16_tflops * 1e12
    eight_bit = {"fp8": card.fp8_tflops, "int8": card.int8_tops}.get(point.precision)
    weight_bytes = 2 if point.precision in ("float16", "bfloat16") else 1
    sums = card.float16_sums if point.precision == "float16" else 1
    head = 2 * config.vocab_size * config.hidden_size // point.tp_size
    matrices = rank_matrices(config, point.tp_size).values * config.num_hidden_layers
    return Rates(
        float_flops=flops,
        matrix_flops=eight_bit * 1e12 if eight_bit else flops,
        read=card.bandwidth_gb_per_s * 1e9,
        headroom=assumptions().boost * sums,
        weights=weight_bytes * matrices + head,
        kv_token=4 * config.num_hidden_layers * local_kv_heads(config, point.tp_size) * config.head_size,
        value_bytes=2,
        step_tokens=min(_STEP_TOKENS, point.prompt) if point.kind == "context" else _STEP_TOKENS,
        links=assumptions().links,  # no point has cards with peer access
    )


def point_roofline(point: Point) -> Roofline:
    """The speed of one replica of a point, at the nominal rates of its card."""
    config = measured().models[point.model].config
    return Roofline(config, RankMapping(point.tp_size), point_rates(point), Shares(_WHOLE, _WHOLE, _WHOLE))


def point_work(point: Point) -> Work:
    """The work of a point, at the nominal rates of its card."""
    roofline = point_roofline(point)
    if point.kind == "generation":
        return roofline.generation(1, point.prompt + point.answer // 2)
    if point.kind == "context":
        return roofline.prompt(point.prompt)
    return roofline.throughput(-(-point.in_flight // point.replicas), point.prompt, point.answer)


@cache
def shares() -> Shares:
    """What the similar points of each kind reach of the nominal speed, with the fast link."""

    def share(kind: str) -> Share:
        reached = [
            point.tokens_per_s / point.replicas / (work.tokens / work.step.nominal.low)
            for point in measured().points
            if point.kind == kind and point.similar
            for work in [point_work(point)]
        ]
        return Share(low=min(reached), median=median(reached), high=max(reached), points=len(reached))

    return Shares(share("context"), share("generation"), share("throughput"))

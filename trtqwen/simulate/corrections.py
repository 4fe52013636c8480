"""Shares of the data sheet's rates that cards and engines reach, from `corrections.json`, with sources."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

_FACTS = Path(__file__).with_name("corrections.json")
Precision = Literal["float16", "int8", "fp8", "int8_wo"]
EngineName = Literal["torch", "vllm", "tensorrt_llm", "llmapi"]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CardShares(_Facts):
    """Shares of a data sheet's rates: reading memory, 16-bit products, 8-bit products."""

    read: float
    float16: float
    int8: float


class Products(_Facts):
    """Matrix products with weights of one precision.

    Attributes:
        kernel_us: microseconds that each product takes besides.
        read: share of the card's reading rate with few rows.
        one_row: the same with one row.
        sharpness: exponent n of the bend: (reading^n + computing^n)^(1/n).
        compute: share of the card's rate with many rows.
    """

    kernel_us: float
    read: float
    one_row: float
    sharpness: float
    compute: float


class Elementwise(_Facts):
    """Values that move for each token and layer, in hidden sizes and in intermediate sizes."""

    hidden: float
    intermediate: float


class EngineShares(_Facts):
    """Shares of one engine.

    Attributes:
        decode_attention: share of the card's reading rate.
        context_attention: share of the data sheet's 16-bit rate.
        one_row: share of the card's reading rate in products with one row, where the engine has its own kernel.
        step_us: fixed microseconds of a step: launches, small kernels, what the host does not hide.
        measured_cards: that the engine was measured on with this model.
        calibrated_on: the workload that `step_us` makes right.
    """

    decode_attention: float
    context_attention: float
    one_row: dict[Precision, float]
    step_us: float
    measured_cards: tuple[str, ...]
    calibrated_on: str


class Serving(_Facts):
    """The server process between engine and clients.

    Attributes:
        token_us: microseconds that it needs for a token.
    """

    token_us: float


class Corrections(_Facts):
    """The content of the file.

    Attributes:
        sampling_us_per_row: of a vocabulary of 152,064.
        serving: of the backends where it was measured.
    """

    sources: dict[str, str]
    cards: dict[str, CardShares]
    products: dict[Precision, Products]
    head_read: float
    sampling_us_per_row: float
    elementwise: Elementwise
    engines: dict[EngineName, EngineShares]
    serving: dict[EngineName, Serving]

    def card(self, name: str) -> CardShares:
        """The shares of a card; those of `other` where none were measured."""
        return self.cards.get(name, self.cards["other"])


@cache
def corrections() -> Corrections:
    """The corrections that ship with trtqwen."""
    return Corrections.model_validate_json(_FACTS.read_text(encoding="utf-8"))

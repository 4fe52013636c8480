"""Facts about GPUs, read from `cards.json`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trtqwen.facts.names import CardName

_FACTS = Path(__file__).with_name("cards.json")


class Card(BaseModel):
    """One GPU. The rates are dense peaks.

    Attributes:
        compute_capability: CUDA's, `major.minor`; engines run on no other.
        usable_gib: memory that CUDA reports, in GiB.
        float16_tflops: float16 and bfloat16 products summed in float32, in TFLOP/s.
        float16_sums: how much faster float16 products are that are summed in float16.
        int8_tops: INT8 products, in TOP/s.
        peer_to_peer: whether its driver lets GPUs read each other's memory; if not, NCCL uses host memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    compute_capability: str
    usable_gib: float
    bandwidth_gb_per_s: float
    float16_tflops: float
    float16_sums: float
    int8_tops: float
    peer_to_peer: bool


@cache
def card_facts(name: CardName) -> Card:
    """The facts of one card."""
    content = json.loads(_FACTS.read_text(encoding="utf-8"))
    return Card.model_validate(content["cards"][name])


def has_peer_to_peer(gpu: str) -> bool:
    """Return whether GPUs of this name (as in nvidia-smi) can read each other's memory."""
    return "GeForce" not in gpu

"""Assumptions of a plan that no measurement covers, from `assumptions.json`, with sources."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_FACTS = Path(__file__).with_name("assumptions.json")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Link(_Facts):
    """A link between GPUs. A collective takes the latency plus its traffic divided by the bandwidth."""

    bus_gb_per_s: float
    latency_us: float


class Links(_Facts):
    """The upper bound of a link, and the low and high end of its likely speed."""

    bound: Link
    fast: Link
    slow: Link

    @property
    def typical(self) -> Link:
        """Between the two ends, by the geometric mean, as `plan.speed` takes its typical forecast."""
        fast, slow = self.fast, self.slow
        return Link(
            bus_gb_per_s=(fast.bus_gb_per_s * slow.bus_gb_per_s) ** 0.5,
            latency_us=(fast.latency_us * slow.latency_us) ** 0.5,
        )


class ContextMemory(_Facts):
    """GiB of a card that CUDA takes, and NCCL with it where there is more than one rank."""

    one_rank: float
    more_ranks: float


class Request(_Facts):
    """A typical request, in tokens."""

    prompt_tokens: int
    answer_tokens: int


class Share(_Facts):
    """Measured speed by the bound, over the measured points of one kind: the lowest, the median and the highest."""

    low: float
    median: float
    high: float
    points: int


class Assumptions(_Facts):
    """All assumptions.

    Attributes:
        logits_buffers: buffers of max_batch_size x vocab_size values that engine and decoder hold.
        boost: by how much cards compute faster than their data sheets say.
        float32_rate: the peak in float32 by the peak in float16.
        links: through host memory, between cards without peer access.
        nvlink: between cards with it.
        typical_lengths: tokens of requests, prompt and answer together.
    """

    sources: dict[str, str]
    context_gib: ContextMemory
    runtime_buffers_bytes: int
    logits_buffers: float
    boost: float
    float32_rate: float
    links: Links
    nvlink: Links
    request: Request
    typical_lengths: tuple[int, ...]

    def links_of(self, *, peer_to_peer: bool) -> Links:
        """The links between cards of one host."""
        return self.nvlink if peer_to_peer else self.links


@cache
def assumptions() -> Assumptions:
    """The assumptions that ship with trtqwen."""
    return Assumptions.model_validate_json(_FACTS.read_text(encoding="utf-8"))

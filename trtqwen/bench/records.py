"""Records of a load generator: of each request, and of its own load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class RequestRecord:
    """One request. All times are seconds of the system's monotonic clock, which all processes of a machine share.

    Attributes:
        index: its place in the workload.
        due: when it should have been sent: its arrival time, or when a place was free.
        sent: when it was sent.
        pieces: arrival time and tokens of each piece of the answer; 0 tokens where the server does not tell.
        ended: when the answer was complete or failed.
        asked_tokens: requested length of the answer.
        prompt_tokens, output_tokens: counted from ids, or reported by the server.
        error: why it failed.
        token_ids, log_probs, text: the answer, if it is kept.
    """

    index: int
    due: float
    asked_tokens: int
    sent: float = 0.0
    pieces: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def first(self) -> float:
        """When the first piece came."""
        return self.pieces[0][0] if self.pieces else self.ended

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the moment it was due: a client that sends late does not make the server look fast."""
        return self.first - self.due

    @property
    def latency(self) -> float:
        """Seconds from the moment it was due to the last piece."""
        return self.ended - self.due

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds between tokens after the first; None for an answer of one token."""
        return (self.ended - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between the pieces."""
        times = [time for time, _ in self.pieces]
        return [later - earlier for earlier, later in pairwise(times)]

    @property
    def early_stop(self) -> bool:
        return self.ok and self.output_tokens < self.asked_tokens


@dataclass(frozen=True)
class ClientLoad:
    """How busy a process of the load generator was in one run.

    Attributes:
        cpu_share: its CPU time by the time that passed.
        lags: seconds by which its event loop woke up too late, sampled all the time.
    """

    cpu_share: float
    lags: Sequence[float]

"""Open engines, their targets, and the route of a model to its targets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtqwen.diagnostics import InputError
from trtqwen.gateway.fleet.observe import Observer
from trtqwen.gateway.fleet.routing import choose
from trtqwen.gateway.fleet.table import ModelEntry, Target
from trtqwen.gateway.generation.inputs import Sampling, engine_inputs
from trtqwen.gateway.state import Runtime

_WARM_TOKENS, _WARM_SECONDS = 32, 60.0


@dataclass(eq=False)
class Engine:
    """An engine that is open.

    Attributes:
        identity: the same in all processes of the gateway.
        requests: number of requests that keep it open.
    """

    identity: str
    runtime: Runtime
    stack: AsyncExitStack
    requests: int = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the engine open until the block ends."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1


@dataclass(frozen=True)
class Serving:
    """A target with its engine; the runtime measures it as this target."""

    target: Target
    engine: Engine
    runtime: Runtime
    observer: Observer

    @property
    def ready(self) -> bool:
        return self.engine.runtime.monitor.ready

    def status(self) -> dict[str, Any]:
        """Return the target's address and state."""
        runtime = self.engine.runtime
        return {
            "name": self.target.name,
            "repository": str(self.target.repository),
            "triton": list(runtime.config.triton),
            "weight": self.target.share,
            "shadow": self.target.shadow,
            "ready": self.ready,
            "requests": self.engine.requests,
            "fingerprint": runtime.model.fingerprint,
        }


@dataclass(frozen=True)
class Route:
    """The targets of a model's requests."""

    name: str
    entry: ModelEntry
    serving: tuple[Serving, ...]
    shadows: tuple[Serving, ...] = ()

    @property
    def ready(self) -> bool:
        return any(one.ready for one in self.serving)

    @property
    def stable(self) -> Serving:
        """The target that others are compared with."""
        return self.serving[0]

    def pick(self, who: str | None) -> Serving:
        """Choose the target of a request. A target that does not answer gets none while another one answers."""
        weighted = [one for one in self.serving if one.target.share]
        candidates = [one for one in weighted if one.ready] or weighted
        return choose(candidates, lambda one: one.target.share, lambda one: one.target.name, who, self.name)


def check_tokenizers(entry: ModelEntry, engines: Mapping[str, Engine]) -> None:
    """Refuse a shadow with another tokenizer, because it gets token ids."""
    stable = engines[entry.stable.name].runtime.model.tokenizer
    for target in entry.targets:
        own = engines[target.name].runtime.model.tokenizer
        if target.shadow is not None and own.token_bytes != stable.token_bytes:
            raise InputError(
                f"{target.name}: its tokenizer differs from that of {entry.stable.name}",
                "compare it as a canary with a weight, or with `trtqwen compare`",
            )


async def warm_up(runtime: Runtime) -> None:
    """Send every replica a request of some length before it serves clients.

    Raises:
        ApiError: if one fails.
    """
    model = runtime.model
    prompt = tuple(range(min(_WARM_TOKENS, model.vocab_size, max(1, model.limits.max_seq_len // 2))))
    tokens = min(_WARM_TOKENS, model.limits.max_seq_len - len(prompt))
    inputs = engine_inputs(model, Sampling({"runtime_top_k": 1}, 0, ignore_eos=True), prompt, tokens, 0)
    for replica in runtime.generator.replicas:
        async for reply in replica.generate(f"warm-up-{os.getpid()}", inputs, _WARM_SECONDS):
            if reply.log_probs and not np.isfinite(reply.log_probs).all():
                raise InputError(f"{replica.address}: computes NaN or infinity", "serve in bfloat16")

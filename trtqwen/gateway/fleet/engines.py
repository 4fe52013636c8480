"""The open engines of a gateway process. Each is opened once, and closed when no model needs it any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from trtqwen.artifact.manifest import load_manifest
from trtqwen.diagnostics import InputError
from trtqwen.gateway.admission.shared import Link
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.fleet.route import Engine
from trtqwen.gateway.fleet.table import ModelTable, Target
from trtqwen.gateway.metrics import Metrics
from trtqwen.gateway.model import ServedModel, load_model
from trtqwen.gateway.state import Connect, running
from trtqwen.gateway.supervision import read_supervision

_POLL_SECONDS = 0.05


class EnginePool:
    """The engines of a gateway process, by their identity.

    Args:
        keys: how many API keys there are.
        needed: whether a model needs an engine.
        on_change: called when an engine starts or stops answering, and after one was closed.

    Attributes:
        closing: the tasks that wait for the last requests on engines that no model needs.
    """

    def __init__(
        self,
        config: GatewayConfig,
        metrics: Metrics,
        connect: Connect,
        link: Link | None,
        keys: int,
        *,
        needed: Callable[[Engine], bool],
        on_change: Callable[[], None],
    ) -> None:
        self.closing: set[asyncio.Task[None]] = set()
        self._config = config
        self._metrics = metrics
        self._connect = connect
        self._link = link
        self._keys = keys
        self._needed = needed
        self._on_change = on_change
        self._engines: dict[str, Engine] = {}

    def __iter__(self) -> Iterator[Engine]:
        return iter(tuple(self._engines.values()))

    def get(self, key: str) -> Engine | None:
        """The engine of an identity, if it is open."""
        return self._engines.get(key)

    async def addresses(self, target: Target) -> tuple[str, ...]:
        """Return the addresses of the target's Tritons; waits for those that `serve` starts.

        Raises:
            InputError: if there are none.
        """
        if target.triton is not None:
            return target.triton
        if self._config.supervisor is None:
            raise InputError(f"{target.name}: has no triton", "name the address of its Triton")
        begun, deadline = time.time(), time.monotonic() + self._config.engine_start_seconds
        while True:
            told = self._told_of(target)
            if told.get("problem") and told["at"] >= begun:  # not that of an earlier try
                raise InputError(f"{target.name}: {told['problem']}")
            if told.get("running"):
                return tuple(told["triton"])
            if time.monotonic() > deadline:
                raise InputError(f"{target.name}: `trtqwen serve` has not started it", "see what serve says")
            await asyncio.sleep(_POLL_SECONDS)

    def _known_addresses(self, target: Target) -> tuple[str, ...]:
        if target.triton is not None:
            return target.triton
        return tuple(self._told_of(target).get("triton", ()))

    def _told_of(self, target: Target) -> Mapping[str, Any]:
        """Return the state of the Tritons that `serve` starts for a target."""
        return read_supervision(self._config.supervisor).engines.get(target.place, {})

    def key(self, name: str, target: Target) -> str:
        """The identity of a target's engine, the same in all processes of the gateway.

        Raises:
            InputError: if its repository is not finished.
        """
        manifest = load_manifest(target.repository, "repository").key
        return "\n".join((name, str(target.repository), *self._known_addresses(target), manifest))

    async def open(
        self, key: str, target: Target, model: ServedModel, addresses: Sequence[str] | None = None
    ) -> Engine:
        """The engine of a target, opened unless it is open already.

        Raises:
            InputError: if no address of a Triton is known for it.
        """
        if (opened := self._engines.get(key)) is not None:
            return opened
        triton = tuple(addresses or self._known_addresses(target))
        if not triton:
            raise InputError(f"{target.name}: has no triton", "name the address of its Triton")
        await asyncio.to_thread(model.tokenizer.make_tables)  # no client waits for them
        config = self._config.model_copy(update={"repository": target.repository, "triton": triton})
        template = model.tokenizer.chat_template
        stack = AsyncExitStack()
        runtime = await stack.enter_async_context(
            running(
                config,
                model,
                None if template is None else ChatTemplate(template),
                self._metrics,
                self._connect,
                self._link,
                keys=self._keys,
                identity=key,
                on_change=self._on_change,
            )
        )
        engine = self._engines[key] = Engine(key, runtime, stack)
        return engine

    async def wait_until_ready(self, engine: Engine, target: Target) -> None:
        """Wait until an engine answers.

        Raises:
            InputError: if it does not within the time for a start.
        """
        deadline = time.monotonic() + self._config.engine_start_seconds
        while not engine.runtime.monitor.ready:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{target.name}: {', '.join(engine.runtime.config.triton)} does not answer",
                    "start a Triton on the repository first",
                )
            await asyncio.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Close the engines that no model needs, each when its last request has ended."""
        for key, engine in self._engines.items():
            if not self._needed(engine) and not any(task.get_name() == key for task in self.closing):
                task = asyncio.create_task(self._close(engine), name=key)
                self.closing.add(task)
                task.add_done_callback(self.closing.discard)

    async def _close(self, engine: Engine) -> None:
        while engine.requests or not engine.runtime.gate.idle:
            await asyncio.sleep(_POLL_SECONDS)
            if self._needed(engine):
                return
        if self._needed(engine):
            return
        del self._engines[engine.identity]
        await engine.stack.aclose()
        self._on_change()


def load_models(table: ModelTable) -> dict[tuple[str, str], ServedModel]:
    """Read every repository of a table, by model and target.

    Raises:
        InputError: if one cannot be used.
    """
    return {
        (name, target.name): load_model(target.repository, name)
        for name, entry in table.models.items()
        for target in entry.targets
    }

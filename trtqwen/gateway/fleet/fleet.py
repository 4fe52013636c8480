"""The engines of one gateway process: open, warm up, switch, drain and close them according to the table.

When all new targets of a model that answer are open and warm, its requests switch to them. Until then, and if a
target cannot be used, they go to the old targets. An engine that no model uses any more is closed when its last
request has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trtqwen.diagnostics import InputError, TrtQwenError
from trtqwen.gateway.admission.shared import Link
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import ApiError
from trtqwen.gateway.fleet.engines import EnginePool
from trtqwen.gateway.fleet.observe import SILENT, Observer, Shadow, end_copies
from trtqwen.gateway.fleet.peers import Peers
from trtqwen.gateway.fleet.route import Engine, Route, Serving, check_tokenizers, warm_up
from trtqwen.gateway.fleet.table import ModelEntry, ModelTable, Target, file_state, read_table, revision
from trtqwen.gateway.metrics import Metrics, watch_process
from trtqwen.gateway.model import ServedModel, load_model
from trtqwen.gateway.state import Connect

_LOOK_SECONDS = 0.5  # between two looks at the table and at the supervisor's file
_log = logging.getLogger(__name__)
State = Literal["starting", "serving", "draining"]


@dataclass
class Change:
    """A change of a model's targets.

    Attributes:
        problem: why it failed.
    """

    entry: ModelEntry
    task: asyncio.Task[None] | None = None
    engines: dict[str, Engine] = field(default_factory=dict)
    problem: str = ""


class Fleet:
    """All models of a gateway process.

    Args:
        models: what `load_models` has read for the first table.
        keys: how many API keys there are.
    """

    def __init__(
        self,
        config: GatewayConfig,
        table: ModelTable,
        models: Mapping[tuple[str, str], ServedModel],
        metrics: Metrics,
        connect: Connect,
        link: Link | None,
        keys: int,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.table = table
        self.draining = False
        self._models = dict(models)
        self._link = link
        self._routes: dict[str, Route] = {}
        self._changes: dict[str, Change] = {}
        self._engines = EnginePool(config, metrics, connect, link, keys, needed=self._needed, on_change=self.show)
        self._seen: tuple[int, ...] = file_state(config.models)
        self._file_problem = ""
        self._peers = Peers(config.supervisor)
        self._told: dict[str, Any] = {}

    # --- what requests ask for

    @property
    def names(self) -> list[str]:
        """The models that requests can name, without aliases; the default first."""
        first = self.default.name
        return [first, *(name for name in self._routes if name != first)]

    @property
    def default(self) -> Route:
        """The model of requests that name none."""
        return self._routes.get(self.table.first) or next(iter(self._routes.values()))

    @property
    def ready(self) -> bool:
        """Whether new requests are taken and a model answers."""
        return not self.draining and any(route.ready for route in self._routes.values())

    @property
    def idle(self) -> bool:
        return all(engine.runtime.gate.idle for engine in self._engines)

    @property
    def states(self) -> dict[str, bool]:
        """Whether each model answers."""
        return {name: route.ready for name, route in self._routes.items()}

    def route(self, name: str | None) -> Route | None:
        """Return the route of a model by name or alias; None for an unknown name."""
        if name is None:
            return self.default
        found = self._find(name)
        if found is None and self.config.models is not None:
            self.look()  # it may have come a moment ago
            found = self._find(name)
        return found

    def _find(self, name: str) -> Route | None:
        if name in self._routes:
            return self._routes[name]
        return next((route for route in self._routes.values() if name in route.entry.aliases), None)

    # --- life

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        """Open the engines of the first table and follow the table until the block ends."""
        tasks: list[asyncio.Task[None]] = []
        try:
            if self._link is not None:
                tasks.append(asyncio.create_task(self._link.listen()))
            for name, entry in self.table.models.items():
                await self._begin(name, entry)
            tasks += [asyncio.create_task(self._watch()), asyncio.create_task(watch_process(self.metrics))]
            yield self
        finally:
            changing = (change.task for change in self._changes.values() if change.task)
            ending = [*tasks, *changing, *self._engines.closing]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            for engine in self._engines:
                await engine.stack.aclose()
            self._peers.leave()

    async def _begin(self, name: str, entry: ModelEntry) -> None:
        """Install the first route of a model, before its engines answer."""
        engines = {}
        for target in entry.targets:
            key = self._engines.key(name, target)
            model = self._models.pop((name, target.name))
            engines[target.name] = await self._engines.open(key, target, model)
        self._install(name, entry, engines)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True
        for change in self._changes.values():
            if change.task is not None:
                change.task.cancel()
        for engine in self._engines:
            engine.runtime.gate.drain()
        self.show()

    def send_away(self, failure: ApiError) -> None:
        """End the wait of all waiting requests."""
        for engine in self._engines:
            engine.runtime.gate.send_away(failure)

    def abort_all(self, failure: ApiError) -> None:
        """End every running answer with an error."""
        for engine in self._engines:
            engine.runtime.generator.abort_all(failure)

    # --- changes

    @property
    def revision(self) -> str:
        return revision(self.table)

    def look(self) -> None:
        """Read the table again if its file has changed; one that cannot be used changes nothing."""
        path = self.config.models
        if path is None or self.draining or (state := file_state(path)) == self._seen:
            return
        self._seen = state
        try:
            table = read_table(path)
        except InputError as problem:
            self._file_problem = str(problem)
            _log.error("the models are as before: %s", problem)
            return
        self._file_problem = ""
        self.apply(table)

    def apply(self, table: ModelTable) -> None:
        """Start to apply a table."""
        self.table = table
        for name in [*self._changes]:
            if name not in table.models:
                self._forget(name)
        for name in [*self._routes]:
            if name not in table.models:
                self._end_shadows(self._routes.pop(name))
                self.metrics.model_up.labels(name).set(0)
        for name, entry in table.models.items():
            route, change = self._routes.get(name), self._changes.get(name)
            if change is not None and change.entry == entry and not change.problem:
                continue
            if change is not None:
                self._forget(name)
            if route is None or route.entry != entry or self._outdated(route):
                change = self._changes[name] = Change(entry)
                change.task = asyncio.create_task(self._change(name, change))
        self._engines.release()
        self.show()

    def _outdated(self, route: Route) -> bool:
        """Whether a repository was written again since its engine was opened."""
        try:
            return any(
                one.engine.identity != self._engines.key(route.name, one.target)
                for one in (*route.serving, *route.shadows)
            )
        except InputError:
            return False  # what runs is better than what is gone

    def _forget(self, name: str) -> None:
        change = self._changes.pop(name)
        if change.task is not None:
            change.task.cancel()

    async def _change(self, name: str, change: Change) -> None:
        """Open and warm up what a model needs, then send its requests there."""
        try:
            for target in change.entry.targets:
                try:
                    await self._prepare(name, target, change)
                except ApiError as problem:
                    raise InputError(f"{target.name}: {problem.message}") from None
            check_tokenizers(change.entry, change.engines)
        except TrtQwenError as problem:
            change.problem = str(problem)
            change.engines.clear()
            _log.error("model %s stays as it was: %s", name, problem)
        else:
            self._install(name, change.entry, change.engines)
            del self._changes[name]
            _log.warning("model %s is served by %s", name, ", ".join(target.name for target in change.entry.targets))
        self._engines.release()
        self.show()

    async def _prepare(self, name: str, target: Target, change: Change) -> None:
        addresses = await self._engines.addresses(target)
        key = self._engines.key(name, target)
        engine = self._engines.get(key)
        if engine is None:
            model = await asyncio.to_thread(load_model, target.repository, name)
            engine = await self._engines.open(key, target, model, addresses)
        change.engines[target.name] = engine
        await self._engines.wait_until_ready(engine, target)
        await warm_up(engine.runtime)

    def _install(self, name: str, entry: ModelEntry, engines: Mapping[str, Engine]) -> None:
        shadows = [
            Shadow(
                target.name,
                target.shadow,
                self._measured(name, target, engines[target.name], ()).runtime.generator,
                engines[target.name].runtime.model.limits.max_batch_size,
                engines[target.name].hold,
            )
            for target in entry.targets
            if target.shadow is not None
        ]
        measured = {
            target.name: self._measured(name, target, engines[target.name], () if target.shadow else shadows)
            for target in entry.targets
        }
        total = sum(target.share for target in entry.targets)
        if (old := self._routes.get(name)) is not None:
            self._end_shadows(old)
            for one in (*old.serving, *old.shadows):
                self.metrics.target_weight.labels(name, one.target.name).set(0)
                self.metrics.target_stable.labels(name, one.target.name).set(0)
        for target in entry.targets:
            self.metrics.target_weight.labels(name, target.name).set(target.share / total)
            self.metrics.target_stable.labels(name, target.name).set(target is entry.stable)
        self._routes[name] = Route(
            name,
            entry,
            tuple(measured[target.name] for target in entry.targets if target.shadow is None),
            tuple(measured[target.name] for target in entry.targets if target.shadow is not None),
        )
        self.show()

    def _end_shadows(self, route: Route) -> None:
        for one in route.shadows:
            end_copies(route.name, one.target.name)

    def _measured(self, name: str, target: Target, engine: Engine, shadows: Sequence[Shadow]) -> Serving:
        """A target's own view of its engine."""
        role: Literal["serve", "shadow"] = "serve" if target.shadow is None else "shadow"
        observer = Observer(self.metrics, name, target.name, role, shadows)
        generator = engine.runtime.generator
        own = replace(generator, observe=observer, metrics=SILENT if role == "shadow" else generator.metrics)
        return Serving(target, engine, replace(engine.runtime, generator=own), observer)

    def _needed(self, engine: Engine) -> bool:
        """Whether a model is served by an engine, or is switching to it."""
        routes = (one.engine for route in self._routes.values() for one in (*route.serving, *route.shadows))
        changes = (one for change in self._changes.values() for one in change.engines.values())
        return any(other is engine for other in (*routes, *changes))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.look()
            self.show()

    # --- what it tells

    @property
    def problems(self) -> dict[str, str]:
        """Return why the table could not be applied, by model; "" is the file itself."""
        found = {name: change.problem for name, change in self._changes.items() if change.problem}
        return found | ({"": self._file_problem} if self._file_problem else {})

    @property
    def settled(self) -> bool:
        """Return whether the table is applied and nothing drains."""
        return not self._changes and not self._engines.closing and not self._file_problem

    def show(self) -> None:
        """Update the metrics and inform the gateway's other processes."""
        for name, route in self._routes.items():
            self.metrics.model_up.labels(name).set(route.ready)
        self.metrics.ready.set(self.ready)
        told = {
            "revision": self.revision,
            "settled": self.settled,
            "switched": not self._changes,
            "problems": self.problems,
            "places": sorted({str(engine.runtime.config.repository) for engine in self._engines}),
            "triton": sorted({address for one in self._engines for address in one.runtime.config.triton}),
        }
        if told != self._told:
            self._told = told
            self._peers.tell(told)

    def everybody(self) -> list[dict[str, Any]]:
        """Return the state of this process and the gateway's other processes."""
        self.show()
        return [self._told, *self._peers.others()]

    def status(self) -> dict[str, Any]:
        """Return each model, its targets and changes in progress, as this process sees them."""
        models = {}
        for name, entry in self.table.models.items():
            route, change = self._routes.get(name), self._changes.get(name)
            targets = [] if route is None else [one.status() for one in (*route.serving, *route.shadows)]
            state = "serving" if change is None else "failed" if change.problem else "changing"
            models[name] = {
                "state": state,
                "problem": None if change is None else change.problem or None,
                "targets": targets,
                "entry": entry.model_dump(mode="json", exclude_none=True),
            }
        draining = [
            {"triton": list(engine.runtime.config.triton), "requests": engine.requests}
            for engine in self._engines
            if not self._needed(engine)
        ]
        return {
            "revision": self.revision,
            "default": self.table.first,
            "models": models,
            "draining": draining,
            "settled": all(one["settled"] and one["revision"] == self.revision for one in self.everybody()),
            "problem": self._file_problem or None,
        }

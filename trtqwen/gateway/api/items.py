"""The items of an answer in order (reasoning, texts and calls), for APIs that number them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from trtqwen.gateway.api.chat import ChatPlan
from trtqwen.gateway.api.chat_response import Event, Step, chat_steps
from trtqwen.gateway.api.reasoning import Reasoning
from trtqwen.gateway.generation.generator import AnswerGenerator
from trtqwen.gateway.generation.plan import TokenLogProb, Usage
from trtqwen.gateway.tools import CallArguments, CallBegins, Content

Kind = Literal["thought", "text", "call"]


@dataclass
class Item:
    """One part of an answer.

    Attributes:
        index: its place in the answer.
        name, call_id: of a call.
    """

    kind: Kind
    index: int
    name: str = ""
    call_id: str = ""
    pieces: list[str] = field(default_factory=list)
    log_probs: list[TokenLogProb] = field(default_factory=list)

    @property
    def text(self) -> str:
        """A thought, a text, or a call's arguments."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Change:
    """A change of an item: it begins, grows by a piece, or ends."""

    what: Literal["begins", "grows", "ends"]
    item: Item
    piece: str = ""
    log_probs: Sequence[TokenLogProb] = ()


class Items:
    """Sorts an answer's events into items.

    Attributes:
        all: in order.
    """

    def __init__(self) -> None:
        self.all: list[Item] = []
        self._open: Item | None = None

    def push(self, events: Iterable[Event], log_probs: Sequence[TokenLogProb] = ()) -> Iterator[Change]:
        """What events change.

        Args:
            log_probs: go with the first text among them.
        """
        for event in events:
            if isinstance(event, CallBegins):
                yield from self.finish()
                yield self._begin(Item("call", len(self.all), event.name, event.id))
                continue
            kind: Kind = (
                "text" if isinstance(event, Content) else "thought" if isinstance(event, Reasoning) else "call"
            )
            if self._open is None or self._open.kind != kind:
                assert not isinstance(event, CallArguments)
                yield from self.finish()
                yield self._begin(Item(kind, len(self.all)))
            assert self._open is not None
            self._open.pieces.append(event.text)
            told, log_probs = (log_probs, ()) if kind == "text" else ((), log_probs)
            self._open.log_probs += told
            yield Change("grows", self._open, event.text, told)

    def finish(self) -> Iterator[Change]:
        """End the item that is open, if any."""
        if self._open is not None:
            yield Change("ends", self._open)
            self._open = None

    def _begin(self, item: Item) -> Change:
        self._open = item
        self.all.append(item)
        return Change("begins", item)


class ItemizedAnswer:
    """A chat's answer as items.

    Attributes:
        last: the last step of it.
    """

    def __init__(self, plan: ChatPlan, generator: AnswerGenerator) -> None:
        self.plan = plan
        self.generator = generator
        self.items = Items()
        self.last: Step | None = None
        self.usage = Usage()

    async def changes(self) -> AsyncGenerator[Change | None, None]:
        """What happens to the items; None for a step without.

        Raises:
            ApiError: if the request is refused or fails.
        """
        async with aclosing(chat_steps(self.plan, self.generator, self.usage)) as steps:
            async for step in steps:
                self.last = step
                for change in self.items.push(step.events, step.log_probs):
                    yield change
                yield None
        for change in self.items.finish():
            yield change

    async def collect(self) -> list[Item]:
        """All items, at the end of the answer.

        Raises:
            ApiError: if the request is refused or fails.
        """
        async with aclosing(self.changes()) as changes:
            async for _ in changes:
                pass
        return self.items.all

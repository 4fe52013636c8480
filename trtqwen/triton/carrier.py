"""Carriers: a stream of Triton that brings the new tokens of many answers to their client.

A response costs Triton, the stub of its python backend and the client CPU time, regardless of its contents. A client
with many answers therefore opens a carrier. One response there has all tokens of its answers that wait. The end of an
answer, with its last tokens, and its error come on the answer's own stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trtqwen.diagnostics import EngineError

Array = npt.NDArray[Any]
_IDLE_SECONDS = 0.5  # an open carrier keeps Triton from stopping, so it ends soon after its last answer


class Sender(Protocol):
    """Sends responses to one Triton request's client. Call nothing after the final response."""

    def send(self, tensors: Mapping[str, Array], *, final: bool) -> None:
        """Send a response."""

    def fail(self, error: str) -> None:
        """Send an error as the final response."""

    def abandoned(self) -> bool:
        """Return whether the client has disconnected or cancelled."""


class Carrier:
    """Sends tokens on one stream, from a thread of its own. Thread-safe.

    Tokens that arrive while a response is sent go into the next one. A response is `output_ids` INT32 [1, n, 2]: the
    number that the client gave an answer, and a token of it.

    Attributes:
        answers: how many use it.
        used: when the last one began or ended, in seconds of the monotonic clock.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._failure: str | None = None
        self._waiting: SimpleQueue[tuple[int, Sequence[int]] | None] = SimpleQueue()
        self.answers = 0
        self.used = time.monotonic()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, number: int, token_ids: Sequence[int]) -> None:
        """Send an answer's new tokens soon.

        Raises:
            EngineError: if earlier ones could not be sent.
        """
        if self._failure is not None:
            raise EngineError(f"its carrier failed: {self._failure}")
        self._waiting.put((number, token_ids))

    def end(self) -> None:
        """End the stream after the tokens that wait."""
        self._waiting.put(None)

    def _run(self) -> None:
        ended = False
        while not ended:
            items = [self._waiting.get()]
            while not self._waiting.empty():
                items.append(self._waiting.get())
            ended = None in items
            rows = [(number, token_id) for number, ids in filter(None, items) for token_id in ids]
            tensors = {"output_ids": np.array(rows, np.int32)[None]} if rows else {}
            try:
                if tensors or ended:
                    self._sender.send(tensors, final=ended)
            except Exception as problem:
                self._failure = str(problem)
                return


class Carriers:
    """The open carriers by the names that their clients gave them. Thread-safe."""

    def __init__(self) -> None:
        self._open: dict[str, Carrier] = {}
        self._lock = threading.Lock()

    def open(self, name: str, sender: Sender) -> None:
        """Open a carrier on a request's stream."""
        with self._lock:
            if name in self._open:
                raise EngineError(f"carrier {name!r} is open already", "use a new name")
            self._open[name] = Carrier(sender)

    def join(self, name: str) -> Carrier | None:
        """The carrier for one more answer; None if this process has none of that name."""
        with self._lock:
            if (carrier := self._open.get(name)) is not None:
                carrier.answers += 1
                carrier.used = time.monotonic()
            return carrier

    def leave(self, carrier: Carrier) -> None:
        """Count an answer that has ended."""
        with self._lock:
            carrier.answers -= 1
            carrier.used = time.monotonic()

    def end_idle(self) -> None:
        """End the carriers that have had no answer for a while."""
        now = time.monotonic()
        with self._lock:
            for name, carrier in tuple(self._open.items()):
                if not carrier.answers and now - carrier.used > _IDLE_SECONDS:
                    del self._open[name]
                    carrier.end()

"""The base class of handles on a running engine: it waits for whole answers, and it is a context manager."""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from trtqwen.executor.request import Request, Response

OnResponse = Callable[[Response], None]
Handle = TypeVar("Handle", bound="EngineHandle")


class EngineHandle(ABC):
    """A running engine; use as a context manager or call `shutdown`."""

    _death: str | None = None  # why it has stopped

    @property
    def alive(self) -> bool:
        """Return whether the engine serves requests."""
        return self._death is None

    @abstractmethod
    def submit(self, request: Request, on_response: OnResponse) -> None:
        """Send a request; its responses come to `on_response`, the last with a finish reason."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop the engine; requests in flight end with an error. May be called again."""

    def generate(self, requests: Sequence[Request]) -> list[list[Response]]:
        """Run requests together and wait for all; each one's responses in order."""
        responses: dict[str, list[Response]] = {request.id: [] for request in requests}
        finished: queue.Queue[str] = queue.Queue()

        def collect(response: Response) -> None:
            responses[response.request_id].append(response)
            if response.finish_reason is not None:
                finished.put(response.request_id)

        for request in requests:
            self.submit(request, collect)
        for _ in requests:
            finished.get()
        return [responses[request.id] for request in requests]

    def __enter__(self: Handle) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

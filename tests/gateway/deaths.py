"""Clients with long streams, and what they must see when somebody is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from tests.gateway.conftest import Running
from tests.waiting import wait_for

LONG = "/again 400 ab"


def process(group: int, word: str) -> int:
    """The process of a session whose command line has this word."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == group and word in (directory / "cmdline").read_text():
                    return int(directory.name)
            except OSError:
                continue
    raise AssertionError(word)


class Streams:
    """Clients that read long answers; each ends with its text, or with the error it got and when."""

    def __init__(self, target: Running, count: int, text: str = LONG, **options: Any) -> None:
        self.texts = [""] * count
        self.errors: list[Exception | None] = [None] * count
        self.ended = [0.0] * count
        self._threads = [
            threading.Thread(target=self._read, args=(target, number, text, options)) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        assert wait_for(lambda: all(self.texts))

    def _read(self, target: Running, number: int, text: str, options: dict[str, Any]) -> None:
        try:
            for chunk in target.chat(text, stream=True, max_tokens=450, **options):
                self.texts[number] += chunk.choices[0].delta.content or ""
        except Exception as problem:
            self.errors[number] = problem
        self.ended[number] = time.monotonic()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def check_death(target: Running, kill: Callable[[], None], **options: Any) -> None:
    """Kill something in mid-stream: every client gets an error, and the gateway says it is not ready."""
    while True:
        streams = Streams(target, 4, **options)
        if not any(streams.ended):
            break
        streams.join()  # this machine was busy, and the engine quick
    killed = time.monotonic()
    kill()
    assert wait_for(lambda: target.get("/ready")[0] == 503)
    streams.join()
    assert all(isinstance(problem, openai.APIError) for problem in streams.errors), streams.errors
    assert max(streams.ended) - killed < 30
    status, headers, body = target.ask("hi")
    assert (status, body["error"]["code"]) == (503, "engine_dead")
    assert "retry-after" in headers
    assert target.get("/health")[0] == 200
    assert target.metric("trtqwen_gateway_in_flight") == 0

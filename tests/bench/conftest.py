"""Scripted servers in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest


class Scripted:
    """A running scripted server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    @property
    def log(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/log", timeout=10) as answer:
            entries: list[dict[str, Any]] = json.loads(answer.read())
            return entries


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    with ExitStack() as started:

        def start(**script: float) -> Scripted:
            command = [sys.executable, "-m", "tests.bench.scripted", json.dumps(script)]
            process = started.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            started.callback(process.kill)
            assert process.stdout is not None
            return Scripted(int(process.stdout.readline()))

        yield start

"""What the demo shows while it runs: answers growing side by side on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from trtqwen.demo.walkthrough import StageTime, load_prompts


class LiveAnswers:
    """An `Audience` for a console; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._prompts = load_prompts()
        self._texts = [""] * len(self._prompts)
        self._lock = threading.Lock()
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def stage(self, stage: StageTime) -> None:
        """Say that a stage is complete."""
        self._console.print(f"{stage.name:<12} {stage.seconds:6.2f} s  {stage.what}", highlight=False)

    def answer(self, index: int, text: str) -> None:
        """Show an answer as far as it has come."""
        with self._lock:
            self._texts[index] = text
            if self._console.is_terminal:
                self._live.update(self._table(), refresh=True)

    def __enter__(self) -> LiveAnswers:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        elif kind is None:
            self._console.print(self._table())

    def _table(self) -> Table:
        table = Table(show_lines=True, expand=True)
        table.add_column("")
        table.add_column("prompt", ratio=1, overflow="fold")
        table.add_column("answer", ratio=2, overflow="fold")
        for prompt, text in zip(self._prompts, self._texts, strict=True):
            table.add_row(prompt.lang, prompt.prompt, text)
        return table

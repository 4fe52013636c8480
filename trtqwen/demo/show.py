"""Show the demo while it runs: growing answers on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from trtqwen.demo.walkthrough import Prompt, Report, StageTime, load_prompts


class LiveAnswers:
    """An `Audience` for a console; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._prompts = load_prompts()
        self._texts = [""] * len(self._prompts)
        self._lock = threading.Lock()
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def stage(self, stage: StageTime) -> None:
        """Print a finished stage."""
        self._console.print(stage_line(stage), highlight=False)

    def answer(self, index: int, text: str) -> None:
        """Show the text of an answer received so far."""
        with self._lock:
            self._texts[index] = text
            if self._console.is_terminal:
                self._live.update(answers_table(self._prompts, self._texts), refresh=True)

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
            self._console.print(answers_table(self._prompts, self._texts))


def answers_table(prompts: Sequence[Prompt], texts: Sequence[str]) -> Table:
    """Prompts and the answers received so far."""
    table = Table(show_lines=True, expand=True)
    table.add_column("")
    table.add_column("prompt", ratio=1, overflow="fold")
    table.add_column("answer", ratio=2, overflow="fold")
    for prompt, text in zip(prompts, texts, strict=True):
        table.add_row(prompt.lang, prompt.prompt, text)
    return table


def report_table(report: Report) -> Table:
    """What the demo measured."""
    table = Table("stage", "seconds", "what")
    for stage in report.stages:
        table.add_row(stage.name, f"{stage.seconds:.2f}", stage.what)
    table.add_section()
    rate = report.tokens / report.generation_seconds
    table.add_row("tokens/s", f"{rate:.0f}", f"{report.tokens} tokens in {report.iterations} steps")
    table.add_row("in flight", f"{report.max_in_flight}", f"of {len(report.answers)} requests, the most at one time")
    return table


def stage_line(stage: StageTime) -> str:
    """One line about a finished stage."""
    return f"{stage.name:<12} {stage.seconds:6.2f} s  {stage.what}"

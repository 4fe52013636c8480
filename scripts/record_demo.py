"""Record `trtqwen demo` as an animated SVG for the README: `python scripts/record_demo.py docs/demo.svg`."""

from __future__ import annotations

import html
import io
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.text import Text

from trtqwen.demo.show import answers_table, report_table, stage_line
from trtqwen.demo.walkthrough import StageTime, load_prompts, walk

WIDTH = 92  # columns
COLUMN = 12.2  # width of one column in Rich's SVG
FRAME_SECONDS = 0.4
LAST_SECONDS = 6.0


@dataclass
class Recorder:
    """An audience that keeps a snapshot of the screen every FRAME_SECONDS."""

    frames: list[RenderableType] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=lambda: [""] * len(load_prompts()))
    taken: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stage(self, stage: StageTime) -> None:
        with self.lock:
            self.stages.append(stage_line(stage))
            self.frames.append(self._screen())

    def answer(self, index: int, text: str) -> None:
        with self.lock:
            self.texts[index] = text
            if time.monotonic() - self.taken > FRAME_SECONDS / 2:
                self.taken = time.monotonic()
                self.frames.append(self._screen())

    def _screen(self) -> RenderableType:
        lines = Text.assemble(("$ make demo\n", "bold"), "\n".join(self.stages))
        return Group(lines, answers_table(load_prompts(), self.texts)) if any(self.texts) else lines


def render(screen: RenderableType, height: int) -> str:
    """One screen as SVG, padded to a number of lines."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(screen)
    rows = len(console.export_text(clear=False).splitlines())
    console.print("\n" * max(0, height - rows), end="")
    svg = console.export_svg(title="trtqwen demo", unique_id="demo")
    return re.sub(r'textLength="[\d.]+"([^>]*)>([^<]*)<', _true_width, svg)


def _true_width(match: re.Match[str]) -> str:
    """Rich counts one column per character, but Chinese and Japanese characters take two."""
    columns = cell_len(html.unescape(match.group(2)))
    return f'textLength="{columns * COLUMN:.1f}"{match.group(1)}>{match.group(2)}<'


def animate(frames: list[str]) -> str:
    """Show SVGs of equal size one after the other, the last one longest."""
    total = FRAME_SECONDS * (len(frames) - 1) + LAST_SECONDS
    rules, groups, opening = [], [], ""
    for index, frame in enumerate(frames):
        # Rich links fonts of another host, and numbers its styles again in each frame.
        plain = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", frame, flags=re.DOTALL).replace("demo-", f"f{index}-")
        match = re.search(r"(<svg[^>]*>).*?<style>(.*?)</style>(.*)</svg>", plain, re.DOTALL)
        assert match is not None
        opening, style, body = match.groups()
        begin, end = (100 * FRAME_SECONDS * place / total for place in (index, index + 1))
        until = 100.0 if index == len(frames) - 1 else end
        still = "visible" if index == len(frames) - 1 else "hidden"  # for viewers that animate nothing
        rules.append(
            f"{style}@keyframes f{index} {{0%,{max(0, begin - 0.001):.3f}%{{visibility:hidden}}"
            f"{begin:.3f}%,{until:.3f}%{{visibility:visible}}"
            f"{min(100, until + 0.001):.3f}%,100%{{visibility:hidden}}}}"
            f".f{index}{{animation:f{index} {total:.1f}s infinite step-end;visibility:{still}}}"
        )
        groups.append(f'<g class="f{index}">{body}</g>')
    return f"{opening}<style>{''.join(rules)}</style>{''.join(groups)}</svg>"


def main() -> None:
    recorder = Recorder()
    report = walk(recorder)
    screens = [*recorder.frames, Group(recorder.frames[-1], report_table(report))]
    height = max(len(_lines(screen)) for screen in screens)
    Path(sys.argv[1]).write_text(animate([render(screen, height) for screen in screens]), encoding="utf-8")


def _lines(screen: RenderableType) -> list[str]:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(screen)
    return console.export_text().splitlines()


if __name__ == "__main__":
    main()

"""`trtqwen demo`: the whole way on this machine, with the bundled model."""

from __future__ import annotations

from rich.table import Table

from trtqwen.cli.output import Json, print_json, stderr, stdout
from trtqwen.demo.show import LiveAnswers
from trtqwen.demo.walkthrough import Report, walk


def command(json: Json = False) -> None:
    """Go the whole way on this machine: convert, build, start Triton, stream eight prompts at once, stop."""
    with LiveAnswers(stderr if json else stdout) as answers:
        report = walk(answers)
    if json:
        print_json(report.model_dump())
    else:
        stdout.print(_table(report))


def _table(report: Report) -> Table:
    table = Table("stage", "seconds", "what")
    for stage in report.stages:
        table.add_row(stage.name, f"{stage.seconds:.2f}", stage.what)
    table.add_section()
    rate = report.tokens / report.generation_seconds
    table.add_row("tokens/s", f"{rate:.0f}", f"{report.tokens} tokens in {report.iterations} steps")
    table.add_row("in flight", f"{report.max_in_flight}", f"of {len(report.answers)} requests, most at one time")
    return table

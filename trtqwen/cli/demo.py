"""`trtqwen demo`: run the bundled model end to end."""

from __future__ import annotations

from trtqwen.cli.output import Json, print_json, stderr, stdout
from trtqwen.demo.show import LiveAnswers, report_table
from trtqwen.demo.walkthrough import walk


def command(json: Json = False) -> None:
    """Run the bundled model end to end: convert, build, start Triton, stream eight answers at once, stop."""
    with LiveAnswers(stderr if json else stdout) as answers:
        report = walk(answers)
    if json:
        print_json(report.model_dump())
    else:
        stdout.print(report_table(report))

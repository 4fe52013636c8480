"""`trtqwen selftest`: compare TensorRT-LLM on this machine with the embedded engine."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from trtqwen.cli.output import Json, print_json, stderr, stdout
from trtqwen.diagnostics import EngineError
from trtqwen.system.host import read_host

if TYPE_CHECKING:
    from trtqwen.selftest.run import DtypeResult


def command(
    engines: Annotated[Path, typer.Option(help="Write engines and logs below this directory, in `selftest`.")] = Path(
        "engines"
    ),
    json: Json = False,
) -> None:
    """Build the bundled model with TensorRT-LLM, run it, and compare its greedy tokens with the embedded engine's.

    For a GPU host. A token that the embedded engine finds as good as its own, up to rounding, counts as a tie.
    """
    if importlib.util.find_spec("torch") is None:
        raise EngineError("selftest needs PyTorch, which is not installed", "`pip install trtqwen[torch]`")
    from trtqwen.selftest.run import run_selftest  # the other commands start without PyTorch

    with stderr.status("building") as status:
        results = run_selftest(
            read_host(), engines / "selftest", watch=lambda progress: status.update(f"building: {progress.line[:80]}")
        )
    ok = all(result.ok for result in results)
    if json:
        print_json({"ok": ok, "dtypes": [{"ok": result.ok, **asdict(result)} for result in results]})
    else:
        stdout.print(_table(results))
    if not ok:
        stderr.print(
            "error: TensorRT-LLM output differs from the embedded engine; do not serve its engine here",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _table(results: list[DtypeResult]) -> Table:
    table = Table("dtype", "prompt", "same tokens", "verdict")
    for result in results:
        for prompt in result.prompts:
            margin = "" if prompt.margin is None else f" ({prompt.margin:.3g} below the best logit)"
            table.add_row(result.dtype, prompt.prompt, str(prompt.same_tokens), prompt.verdict + margin)
    return table
